"""Hugging Face's Trainer with FusedCelo2: a GPT-2 of 0.8M parameters on the bytes of the Wikipedia text in the package.

    python hf_trainer.py --steps 200 --out-dir gpt2-celo2
    python hf_trainer.py --steps 200 --out-dir gpt2-celo2 --resume

The second command goes on from the last checkpoint. `--ready-made` hands over an optimizer and a schedule that are made
already, through `optimizers=`; with FSDP the Trainer takes the first way alone.

For the real size: a `GPT2Config` of yours (or any model of transformers), a tokenizer and a data set, `bf16=True`,
and half of the rate that AdamW had (docs/learning-rates.md). The Trainer hands over groups with the weight decay of its
`TrainingArguments`, which wins over one beside `lr`; its `learning_rate` is not read. With `--ready-made` neither is.
"""

import argparse
import lzma

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import Dataset, Subset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from celo2 import FusedCelo2
from celo2.pretrain.prepare_data import EMBEDDED_TEXT

CONTEXT = 128


class Windows(Dataset):
    """Windows of the text, one token a byte."""

    def __init__(self) -> None:
        with lzma.open(EMBEDDED_TEXT) as file:
            self.tokens = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self.tokens) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.tokens[index * CONTEXT : (index + 1) * CONTEXT]
        return {"input_ids": window, "labels": window}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 with FusedCelo2 in Hugging Face's Trainer.")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--out-dir", default="gpt2-celo2", metavar="DIR", help="checkpoints (default: gpt2-celo2)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out-dir")
    parser.add_argument("--ready-made", action="store_true", help="hand over an optimizer, not its class")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: must be at least 1")
    checkpoint = get_last_checkpoint(options.out_dir) if options.resume else None

    windows = Windows()
    cut = len(windows) - 64
    dataset, held_out = Subset(windows, range(cut)), Subset(windows, range(cut, len(windows)))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    arguments = TrainingArguments(
        output_dir=options.out_dir,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=max(1, options.steps // 2),
        report_to="none",
        disable_tqdm=True,
    )
    lr = 2e-3
    if options.ready_made:
        optimizer = FusedCelo2(model, lr=lr)
        scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=arguments.max_steps)
        trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, scheduler))
    else:
        trainer = Trainer(
            model,
            arguments,
            train_dataset=dataset,
            optimizer_cls_and_kwargs=(FusedCelo2, {"lr": lr, "module": model}),
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    print(f"validation loss {trainer.evaluate(held_out)['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
