"""The decoder-only transformers of the harness, and their sizes.

`gpt2` has learned positions, LayerNorm, a tied head and by default no biases (Radford et al. 2019). `modern`
has RoPE, RMSNorm and QK-norm without gain, an untied head and no biases (the language-model architecture of
the Celo2 paper, from Marek et al., arXiv 2507.07101). Both have a tanh GELU. `speedrun` is the fixed architecture of
the optimization track of modded-nanogpt (Jordan et al.): as `modern`, with biases and gains, RoPE on half of each head,
squared ReLU, a norm after the embedding, attention scaled by 0.12 and capped logits.

Shape suffixes: B batch, T tokens, D width, H heads, K head dim, V vocabulary, P the same padded, C = 3 (query, key,
value).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from celo2 import MatrixView
from celo2.pretrain.documents import Mask, attend, document_blocks, document_mask
from celo2.pretrain.loss import cap_logits, linear_cross_entropy

ARCHS = ("gpt2", "modern", "speedrun")
VOCAB_SIZES = {"bytes": 257, "gpt2": 50257}
ROPE_BASE = 1e4
# modules whose rows are tokens
PADDED = ("token_embedding", "lm_head")
NORM_EPS = {"gpt2": 1e-5, "modern": 1e-6, "speedrun": torch.finfo(torch.float32).eps}
# of speedrun
LOWEST_FREQUENCY = 1 / 1024
ATTENTION_SCALE = 0.12
LOGIT_CAP = 15.0


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model; raises ValueError for an unknown arch, sizes < 1, biases or odd heads in `modern`."""

    arch: str
    n_layer: int
    n_head: int
    head_dim: int
    context: int
    vocab_size: int
    bias: bool = False
    """Biases in Linear and LayerNorm, of `gpt2`, whose published parameter counts include them; `speedrun` has them."""

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise ValueError(f"unknown arch {self.arch!r}: choose one of {', '.join(ARCHS)}")
        for name in ("n_layer", "n_head", "head_dim", "context", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer >= 1")
        even = {"gpt2": 1, "modern": 2, "speedrun": 4}[self.arch]
        if (self.arch != "gpt2" and self.bias) or self.head_dim % even:
            got = f"bias={self.bias}, head_dim={self.head_dim}"
            raise ValueError(
                f"{got}: arch={self.arch!r} takes bias=False and a head_dim that {even} divides, or use arch='gpt2'"
            )

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.n_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding and the head in memory: a multiple of 128 where that adds less than 1%.

        50,257 become 50,304, so that rows of logits begin at multiples of 16 bytes and tensor cores see whole tiles;
        257 stay. No loss and no logit that is returned sees the difference, and no parameter count has it; memory and
        messages do.

        Rows that are padding have a gradient of zero. AdamW, Muon and `celo2` leave them at zero. `celo2-base`, whose
        learned rule steps embeddings too, moves them, which nothing reads, and its means over a matrix count them:
        the other rows move further by up to sqrt(50304 / 50257), 0.05%, than without padding.
        """
        padded = -(-self.vocab_size // 128) * 128
        return padded if 100 * padded < 101 * self.vocab_size else self.vocab_size

    @property
    def biased(self) -> bool:
        """Whether Linear layers have biases."""
        return self.bias or self.arch == "speedrun"

    @property
    def tied(self) -> bool:
        """Whether the output head is the token embedding."""
        return self.arch == "gpt2"


@dataclass(frozen=True)
class Size:
    """A named size: the `gpt2` shape, the default architecture and the tokenizer ("bytes" or "gpt2")."""

    n_layer: int
    n_head: int
    head_dim: int
    context: int
    arch: str = "gpt2"
    tokenizer: str = "gpt2"


SIZES: dict[str, Size] = {
    "nano": Size(4, 4, 32, 256, tokenizer="bytes"),
    "30m": Size(6, 3, 128, 512, arch="modern"),
    "small": Size(12, 12, 64, 1024),
    "medium": Size(24, 16, 64, 1024),
    "large": Size(36, 20, 64, 1024),
    "gpt2-xl": Size(48, 25, 64, 1024),
    "xl": Size(24, 16, 128, 2048),
}


def model_config(size: str, arch: str | None = None, *, bias: bool = False) -> GPTConfig:
    """Configuration of a named size; `arch=None` takes the size's default.

    `modern` and `speedrun` widen heads of 64 to 128 where the width allows it (small is 6 x 128, gpt2-xl 25 x 64).
    Raises ValueError for an unknown size or architecture.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    spec = SIZES[size]
    arch = spec.arch if arch is None else arch
    n_head, head_dim = spec.n_head, spec.head_dim
    if arch in ("modern", "speedrun") and head_dim == 64 and n_head % 2 == 0:
        n_head, head_dim = n_head // 2, 128
    return GPTConfig(arch, spec.n_layer, n_head, head_dim, spec.context, VOCAB_SIZES[spec.tokenizer], bias)


class Linear(nn.Linear):
    """A Linear that draws nothing when constructed: NaN until `GPT.init_weights` or a checkpoint fills it."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)


class Embedding(nn.Embedding):
    """An Embedding that draws nothing when constructed, like `Linear`."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, math.nan)


def _pad_rows(model: "GPT", state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Pad the rows of a state dict that has none, so that weights from elsewhere load."""
    config = model.config
    for name in PADDED:
        weight = state_dict.get(f"{prefix}{name}.weight")
        if weight is not None and weight.shape[0] == config.vocab_size != config.padded_vocab_size:
            extra = config.padded_vocab_size - config.vocab_size
            state_dict[f"{prefix}{name}.weight"] = F.pad(weight, (0, 0, 0, extra))
            if (bias := state_dict.get(f"{prefix}{name}.bias")) is not None:
                state_dict[f"{prefix}{name}.bias"] = F.pad(bias, (0, extra))


def _tie_again(model: "GPT", _: object) -> None:
    """Tie the head after a load that made new parameters."""
    model.tie()


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm with gain for `gpt2`, RMSNorm for the others, without gain for `modern`, over the width."""
    eps = NORM_EPS[config.arch]
    if config.arch != "gpt2":
        return nn.RMSNorm(config.width, eps=eps, elementwise_affine=config.arch == "speedrun")
    return nn.LayerNorm(config.width, eps=eps, bias=config.bias)


def rope_tables(length: int, head_dim: int, device: torch.device, arch: str = "modern") -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, each float32 [length, head_dim / 2].

    Frequencies are ROPE_BASE**(-2i / head_dim) (Su et al. 2021, arXiv 2104.09864, equation 15); of `speedrun` a quarter
    of head_dim from 1 to LOWEST_FREQUENCY, and a quarter of zeros.
    """
    half = head_dim // 2
    if arch == "speedrun":
        part_K = torch.linspace(0, 1, half // 2, device=device, dtype=torch.float32)
        frequency_K = torch.cat((LOWEST_FREQUENCY**part_K, torch.zeros_like(part_K)))
    else:
        frequency_K = ROPE_BASE ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle_TK = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency_K
    return angle_TK.cos(), angle_TK.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Apply RoPE: rotate element i of the first half with element i of the second, in float32 or wider."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK), dim=-1)


def qk_norm(x_BHTK: Tensor) -> Tensor:
    """Scale each head's vector to root mean square 1, without gain."""
    return F.rms_norm(x_BHTK, x_BHTK.shape[-1:], eps=NORM_EPS["modern"])


class Attention(nn.Module):
    """Causal multi-head self-attention; rows of `qkv` are query, key, value, each split in heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads_shape = (3, config.n_head, config.head_dim)
        # None: over the root of head_dim
        self.scale = ATTENTION_SCALE if config.arch == "speedrun" else None
        self.qkv = Linear(config.width, 3 * config.width, bias=config.biased)
        self.out = Linear(config.width, config.width, bias=config.biased)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Mask = None) -> Tensor:
        qkv_BTCHK = self.qkv(x_BTD).unflatten(-1, self.heads_shape)
        # heads and tokens change places after the parts are apart: the gradients then come together as qkv lies
        q_BHTK, k_BHTK, v_BHTK = (part_BTHK.transpose(1, 2) for part_BTHK in qkv_BTCHK.unbind(2))
        if rope is not None:
            q_BHTK = rotate(qk_norm(q_BHTK), *rope).type_as(v_BHTK)
            k_BHTK = rotate(qk_norm(k_BHTK), *rope).type_as(v_BHTK)
        y_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, mask, self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Up-projection to 4D, tanh GELU (`speedrun`: squared ReLU), down-projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.squared = config.arch == "speedrun"
        self.up = Linear(config.width, 4 * config.width, bias=config.biased)
        self.down = Linear(4 * config.width, config.width, bias=config.biased)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.squared:
            return self.down(F.relu(self.up(x_BTD)).square())
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block; with `recompute` its backward pass computes the activations again."""

    def __init__(self, config: GPTConfig, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Mask = None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # within the block, so that what fully_shard gathers for it is gathered once for both
            return checkpoint(self._forward, x_BTD, rope, mask, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BTD, rope, mask)

    def _forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Mask) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, mask)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    """A language model of one of `ARCHS`; its weights are NaN until `init_weights` or a loaded state.

    `recompute` trades time for memory in every block's backward pass; `loss_chunks` above 1 computes the loss in that
    many parts (`linear_cross_entropy`), so that logits never exist all at once. With `mask_documents` attention stays
    within documents, which begin with the last token of the vocabulary.
    """

    def __init__(
        self, config: GPTConfig, *, recompute: bool = False, loss_chunks: int = 1, mask_documents: bool = False
    ) -> None:
        super().__init__()
        if loss_chunks < 1:
            raise ValueError(f"loss_chunks={loss_chunks}: must be at least 1")
        self.config = config
        self.loss_chunks = loss_chunks
        self.mask_documents = mask_documents
        self.compiled = False
        self.token_embedding = Embedding(config.padded_vocab_size, config.width)
        self.position_embedding = Embedding(config.context, config.width) if config.arch == "gpt2" else None
        self.embedding_norm = make_norm(config) if config.arch == "speedrun" else None
        self.blocks = nn.ModuleList(Block(config, recompute) for _ in range(config.n_layer))
        self.final_norm = make_norm(config)
        # the tied head is built on meta: its own [V, D] weight would only be thrown away
        head_device = torch.device("meta") if config.tied else None
        bias = config.arch == "speedrun"
        self.lm_head = Linear(config.width, config.padded_vocab_size, bias=bias, device=head_device)
        self.tie()
        self.register_load_state_dict_pre_hook(_pad_rows)  # type: ignore[no-untyped-call]
        # load_state_dict(assign=True) makes new parameters too
        self.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]

    def tie(self) -> None:
        if self.config.tied:
            self.lm_head.weight = self.token_embedding.weight

    def compile_parts(self) -> None:
        """Compile every block, and the softmax of a loss in chunks, when they are first used."""
        self.compiled = True
        for block in self.blocks:
            block.compile()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # leaving the meta device (to_empty) makes new parameters and would untie the head
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, reduction: Literal["mean", "sum"] = "mean"
    ) -> Tensor:
        """Logits, or the next-token cross-entropy when targets are given.

        Both are int64 [B, T <= context]; targets of -100 do not count. Returns logits [B, T, V] in the compute dtype
        (float32 of `speedrun`), or the 0-d float32 loss in nats. Raises ValueError for other shapes and an unknown
        reduction.
        """
        if tokens_BT.ndim != 2 or not 1 <= tokens_BT.shape[1] <= self.config.context:
            raise ValueError(
                f"tokens have shape {tuple(tokens_BT.shape)}: pass [batch, T] with 1 <= T <= context = "
                f"{self.config.context}; crop the sequence or build the model with a longer context"
            )
        length = tokens_BT.shape[1]
        if reduction not in ("mean", "sum"):
            raise ValueError(f"unknown reduction {reduction!r}: choose one of mean, sum")
        if targets_BT is not None and targets_BT.shape != tokens_BT.shape:
            shape = tuple(targets_BT.shape)
            raise ValueError(f"targets have shape {shape}, not {tuple(tokens_BT.shape)} as the tokens")
        x_BTD = self.token_embedding(tokens_BT)
        rope = None
        if self.position_embedding is None:
            # computed here rather than kept as buffers, which casts and to_empty would damage
            rope = rope_tables(length, self.config.head_dim, tokens_BT.device, self.config.arch)
        else:
            x_BTD = x_BTD + self.position_embedding(torch.arange(length, device=tokens_BT.device))
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        mask: Mask = None
        if self.mask_documents:
            # flex_attention is a kernel where it is compiled, and has a backward pass on GPUs alone
            make = document_blocks if self.compiled and tokens_BT.is_cuda else document_mask
            mask = make(tokens_BT, self.config.vocab_size - 1)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope, mask)
        x_BTD = self.final_norm(x_BTD)
        if targets_BT is None or self.loss_chunks == 1:
            logits_BTP = self._logits(x_BTD)
            if targets_BT is None:
                return logits_BTP[..., : self.config.vocab_size]
            logits_NP = self._without_padding(logits_BTP).flatten(0, 1).float()
            return F.cross_entropy(logits_NP, targets_BT.flatten(), reduction=reduction)
        return linear_cross_entropy(
            x_BTD.flatten(0, 1),
            self.lm_head.weight,
            self.lm_head.bias,
            targets_BT.flatten(),
            chunks=self.loss_chunks,
            vocab_size=self.config.vocab_size,
            cap=LOGIT_CAP if self.config.arch == "speedrun" else None,
            reduction=reduction,
            compiled=self.compiled,
        )

    def _logits(self, x_D: Tensor) -> Tensor:
        """The head's logits [..., P] of x [..., D]; those of `speedrun` stay within LOGIT_CAP, in float32 or wider."""
        logits_P: Tensor = self.lm_head(x_D)
        if self.config.arch != "speedrun":
            return logits_P
        return cap_logits(logits_P, LOGIT_CAP)

    def _without_padding(self, logits_P: Tensor) -> Tensor:
        """Take the logits [..., P] of rows that are padding out of every softmax, in place.

        Their gradient is exactly zero then, so backwards nothing is left to do: a slice would fill another tensor of
        the size of the logits.
        """
        if self.config.padded_vocab_size != self.config.vocab_size:
            with torch.no_grad():
                logits_P[..., self.config.vocab_size :] = -math.inf
        return logits_P

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from its own generator, the same values on every device.

        `gpt2`: standard deviation 0.02, over sqrt(2 n_layer) into the residual stream; biases 0, gains 1.
        `modern`: Xavier-uniform, heads counted as receptive field (JAX's initialiser of [3, H, D, K]);
        embeddings of variance 1 / D. `speedrun`: embeddings of variance 1, zeros into the residual stream and in the
        head, elsewhere a variance of 0.33 over the inputs. Rows that are padding are 0. Every rank of a sharded model
        draws the whole stream and keeps its part.
        Raises ValueError on the meta device.
        """
        generator = torch.Generator().manual_seed(seed)
        config = self.config
        heads, dim, width = config.n_head, config.head_dim, config.width
        # fan in + fan out
        fans = {"qkv": 3 * heads * (width + dim), "out": heads * (width + dim)}
        fans |= {"up": 5 * width, "down": 5 * width}
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device: call model.to_empty(device=...) first")
            module, leaf = name.split(".")[-2:]
            if leaf == "bias" or module.endswith("norm"):
                parameter.fill_(0.0 if leaf == "bias" else 1.0)
                continue
            # drawn in float32 on the CPU: one stream for every device and dtype, without the padding
            rows = config.vocab_size if module in PADDED else parameter.shape[0]
            draw = torch.empty(rows, *parameter.shape[1:], dtype=torch.float32, device="cpu")
            if config.arch == "speedrun":
                std = 1.0 if module == "token_embedding" else math.sqrt(0.33 / parameter.shape[1])
                std = 0.0 if module in ("out", "down", "lm_head") else std
                draw.normal_(0.0, std, generator=generator)
            elif config.arch == "modern" and module in fans:
                limit = math.sqrt(6 / fans[module])
                draw.uniform_(-limit, limit, generator=generator)
            else:
                residual = 0.02 / math.sqrt(2 * config.n_layer) if module in ("out", "down") else 0.02
                std = 1 / math.sqrt(width) if config.arch == "modern" else residual
                draw.normal_(0.0, std, generator=generator)
            draw = F.pad(draw, (0, 0, 0, parameter.shape[0] - rows))
            if isinstance(parameter, DTensor):
                # from this rank's own draw: no message
                draw = distribute_tensor(draw, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(draw)

    def num_params(self) -> int:
        """Number of parameters, a tied head counted once and rows that are padding not at all."""
        return sum(parameter.numel() for parameter in self.parameters()) - sum(self.padding().values())

    def padding(self) -> dict[Tensor, int]:
        """Elements that are padding, by the parameter that has them."""
        rows = self.config.padded_vocab_size - self.config.vocab_size
        found: dict[Tensor, int] = {m.weight: rows * self.config.width for m in (self.token_embedding, self.lm_head)}
        return found if self.lm_head.bias is None else {**found, self.lm_head.bias: rows}

    def flops_per_token(self) -> int:
        """Training FLOPs (forward and backward) a token: 6 N + 12 n_layer * width * context.

        N is every parameter but the embedding tables, with the output head, tied or not.
        Source: PaLM, appendix B (Chowdhery et al. 2022, arXiv 2204.02311); causal masking is not discounted.
        """
        config = self.config
        lookups = 0 if config.tied else config.vocab_size * config.width
        if self.position_embedding is not None:
            lookups += config.context * config.width
        return 6 * (self.num_params() - lookups) + 12 * config.n_layer * config.width * config.context

    def matrix_views(self) -> dict[str, MatrixView]:
        """How the attention weights split into one matrix per head, by parameter name.

        qkv [3 H K, D] is 3 H blocks [K, D]; out [D, H K] is H blocks [D, K]: the authors' slices.
        """
        heads = self.config.n_head
        views: dict[str, MatrixView] = {}
        for index in range(self.config.n_layer):
            views[f"blocks.{index}.attention.qkv.weight"] = MatrixView(split=3, heads=heads, axis=0)
            views[f"blocks.{index}.attention.out.weight"] = MatrixView(heads=heads, axis=1)
        return views

    @torch.no_grad()
    def generate(
        self,
        tokens_BT: Tensor,
        count: int,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Append `count` sampled tokens to each prompt; a generator in the same state gives the same tokens.

        tokens_BT is int64 [B, T >= 1]; the result [B, T + count]. The model sees the last `context` tokens.
        Temperature 0 takes the likeliest. Raises ValueError for an empty prompt or arguments out of range.
        """
        if tokens_BT.ndim != 2 or tokens_BT.shape[1] < 1:
            raise ValueError(f"prompt has shape {tuple(tokens_BT.shape)}: pass [batch, T] with T >= 1")
        if count < 0 or not 0.0 <= temperature < math.inf or (top_k is not None and top_k < 1):
            raise ValueError(f"{count=} must be >= 0, {temperature=} finite and >= 0, {top_k=} >= 1 or None")
        was_training = self.training
        self.eval()
        try:
            for _ in range(count):
                logits_BV = self(tokens_BT[:, -self.config.context :])[:, -1].float()
                if temperature == 0.0:
                    next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
                else:
                    if top_k is not None and top_k < logits_BV.shape[-1]:
                        floor_B1 = logits_BV.topk(top_k).values[:, -1:]
                        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)
                    odds_BV = F.softmax(logits_BV / temperature, dim=-1)
                    next_B1 = torch.multinomial(odds_BV, 1, generator=generator)
                tokens_BT = torch.cat((tokens_BT, next_B1), dim=1)
        finally:
            self.train(was_training)
        return tokens_BT
