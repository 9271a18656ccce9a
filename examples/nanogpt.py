"""A GPT in the shape of nanoGPT, trained with FusedCelo2: the three lines marked "celo2" differ from AdamW's run.

    python nanogpt.py --steps 200

trains 0.8M parameters on the bytes of the Wikipedia text in the package, and prints the loss.

For the real size: n_layer=12, n_head=12, n_embd=768, block_size=1024 and the vocabulary of your tokenizer in `GPT`,
your tokens in `embedded_bytes`, micro-batches until a step has 0.5M tokens, a GPU with bfloat16 autocast, and half of
the rate that AdamW had (docs/learning-rates.md). examples/README.md says which lines of nanoGPT itself change.
"""

import argparse
import lzma
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from celo2 import FusedCelo2  # celo2
from celo2.pretrain.prepare_data import EMBEDDED_TEXT

BATCH_SIZE, BLOCK_SIZE = 16, 128
GRAD_CLIP = 1.0


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to what came in."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(n_embd)
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.attn_proj = nn.Linear(n_embd, n_embd)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.mlp_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        parts = self.c_attn(self.ln_1(x_BTC)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in parts)
        attended_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.attn_proj(attended_BHTD.transpose(1, 2).flatten(2))
        return x_BTC + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x_BTC))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, and a head that is tied to the token embedding."""

    def __init__(self, vocab_size: int = 256, n_layer: int = 4, n_head: int = 4, n_embd: int = 128) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(BLOCK_SIZE, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTC = self.wte(tokens_BT) + self.wpe.weight[: tokens_BT.shape[1]]
        for block in self.h:
            x_BTC = block(x_BTC)
        return F.cross_entropy(self.lm_head(self.ln_f(x_BTC)).flatten(0, 1), targets_BT.flatten())

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float]) -> FusedCelo2:
        return FusedCelo2(self, lr=learning_rate, weight_decay=weight_decay, adam_betas=betas)  # celo2


def embedded_bytes() -> Tensor:
    """The text of the package, one token a byte."""
    with lzma.open(EMBEDDED_TEXT) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()


def get_batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Random windows [B, T], and the tokens after each of theirs."""
    starts = torch.randint(len(tokens) - BLOCK_SIZE, (BATCH_SIZE,))
    windows = torch.stack([tokens[i : i + BLOCK_SIZE + 1] for i in starts])
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def estimate_loss(model: GPT, tokens: Tensor) -> float:
    return sum(float(model(*get_batch(tokens))) for _ in range(10)) / 10


def get_lr(step: int, steps: int, learning_rate: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def main() -> None:
    parser = argparse.ArgumentParser(description="A GPT in the shape of nanoGPT, trained with FusedCelo2.")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: must be at least 1")
    torch.manual_seed(1337)
    tokens = embedded_bytes()
    train, validation = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    model = GPT()
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=arguments.lr, betas=(0.9, 0.95))
    print(optimizer.table(collapse=True))
    for step in range(arguments.steps):
        lr = get_lr(step, arguments.steps, arguments.lr)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr * param_group["lr_mult"]  # celo2
        loss = model(*get_batch(train))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(f"step {step} | loss {loss.item():.4f} | lr {lr:.2e}", flush=True)
    print(f"validation loss {estimate_loss(model, validation):.4f}")


if __name__ == "__main__":
    main()
