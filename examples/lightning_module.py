"""A LightningModule with FusedCelo2: a byte model of 0.8M parameters on the Wikipedia text in the package.

    python lightning_module.py --steps 200

For the real size: your model in `Task`, a tokenizer and a `LightningDataModule`, `precision="bf16-mixed"`, and half
of the rate that AdamW had (docs/learning-rates.md). With FSDP2 (`strategy=ModelParallelStrategy()`) shard the model
in `configure_model`; the rest stays. To warm up and decay, return {"optimizer": ..., "lr_scheduler": {"scheduler":
..., "interval": "step"}}.
"""

import argparse
import lzma

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from celo2 import FusedCelo2
from celo2.pretrain.prepare_data import EMBEDDED_TEXT

CONTEXT, WIDTH = 128, 128
lr = 1e-3


class Model(nn.Module):
    """Embeddings, four causal blocks and a head: logits [B, T, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, WIDTH)
        self.embed_positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        length = tokens_BT.shape[1]
        mask_TT = nn.Transformer.generate_square_subsequent_mask(length, device=tokens_BT.device)
        x_BTD = self.embed_tokens(tokens_BT) + self.embed_positions.weight[:length]
        for block in self.blocks:
            x_BTD = block(x_BTD, src_mask=mask_TT, is_causal=True)
        return self.lm_head(self.norm(x_BTD))


def loss_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return nn.functional.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())


class Task(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, tokens, _):
        loss = loss_of(self.model, tokens)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return FusedCelo2(self.model, lr=lr)


class PrintLoss(lightning.Callback):
    """Print the loss of every tenth step, and of the last."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        step = trainer.global_step
        if step % 10 == 1 or step == trainer.max_steps:
            print(f"step {step} | loss {trainer.callback_metrics['loss']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small model with FusedCelo2 in Lightning.")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: must be at least 1")
    lightning.seed_everything(0, verbose=False)
    with lzma.open(EMBEDDED_TEXT) as file:
        tokens = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    trainer = lightning.Trainer(
        max_steps=arguments.steps,
        gradient_clip_val=1.0,
        callbacks=[PrintLoss()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(Model()), DataLoader(windows, batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()
