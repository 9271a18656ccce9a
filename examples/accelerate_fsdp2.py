"""accelerate with FSDP2 and FusedCelo2: a byte model of 0.8M parameters on the Wikipedia text in the package.

    accelerate launch --num_processes 8 accelerate_fsdp2.py             # GPUs
    torchrun --nproc-per-node 2 accelerate_fsdp2.py --steps 100         # two processes on CPUs

Parameters, and the optimizer's state with them, are sharded over the processes; each takes other rows of a batch.
accelerate knows FSDP on accelerators alone: on CPUs it replicates the model (`MULTI_CPU` in the first line), and
nothing else changes.

For the real size: your model and data, the class of its blocks in `transformer_cls_names_to_wrap`,
`Accelerator(mixed_precision="bf16")`, and half of the rate that AdamW had (docs/learning-rates.md).
"""

import argparse
import lzma

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from celo2 import FusedCelo2
from celo2.pretrain.prepare_data import EMBEDDED_TEXT

CONTEXT, WIDTH, ROWS = 128, 128, 8


class Model(nn.Module):
    """Embeddings, four causal blocks and a head."""

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
        """Mean loss of the next token."""
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        length = inputs_BT.shape[1]
        mask_TT = nn.Transformer.generate_square_subsequent_mask(length, device=tokens_BT.device)
        x_BTD = self.embed_tokens(inputs_BT) + self.embed_positions.weight[:length]
        for block in self.blocks:
            x_BTD = block(x_BTD, src_mask=mask_TT, is_causal=True)
        return nn.functional.cross_entropy(self.lm_head(self.norm(x_BTD)).flatten(0, 1), targets_BT.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small model with FusedCelo2 and FSDP2 in accelerate.")
    parser.add_argument("--steps", type=int, default=100, help="default: 100")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: must be at least 1")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["TransformerEncoderLayer"],
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
    with lzma.open(EMBEDDED_TEXT) as file:
        tokens = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)

    # the same weights on all processes
    torch.manual_seed(0)
    model = Model()
    lr = 2e-3
    optimizer = FusedCelo2(model, lr=lr)
    # `prepare` makes a schedule step once for each process
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=arguments.steps * accelerator.num_processes)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader, scheduler = accelerator.prepare(DataLoader(windows, batch_size=ROWS, shuffle=True), scheduler)

    accelerator.print(f"{accelerator.distributed_type.value} on {accelerator.num_processes} processes")
    batches = iter(loader)
    for step in range(arguments.steps):
        loss = model(next(batches))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == arguments.steps - 1:
            mean = accelerator.reduce(loss.detach(), reduction="mean")
            accelerator.print(f"step {step} | loss {mean.item():.4f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
