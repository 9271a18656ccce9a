"""Linear layers of the blocks in FP8, through torchao: products of 8-bit floats with a scale for each tensor.

Weights, gradients and the optimizer stay as they are, under the same names: torchao scales and casts a layer's input,
weight and gradient where it multiplies (Micikevicius et al. 2022, arXiv 2209.05433). Embeddings, head and norms keep
the dtype of the run.
"""

import torch

from celo2.pretrain import require
from celo2.pretrain.model import GPT

CAPABILITY = (8, 9)
# sides of a product of 8-bit floats are multiples of it
MULTIPLE = 16


def require_fp8(device: torch.device, dtype: str) -> None:
    """Raise ValueError, or ImportError without torchao, unless `--fp8` can run: on a GPU from Ada or Hopper on."""
    if device.type != "cuda":
        raise ValueError(f"--fp8 needs a GPU that multiplies in FP8 (H100, RTX 4090 or newer), and this is {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ValueError(
            f"--fp8 needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, and {device} has "
            f"{capability[0]}.{capability[1]}: leave it out"
        )
    if dtype != "bfloat16":
        raise ValueError(f"--fp8 goes with --dtype bfloat16, not {dtype}")
    require("torchao", extra="fp8")


def convert(model: GPT, *, emulate: bool = False) -> None:
    """Let the Linear layers of the blocks multiply in FP8, in place; `emulate` computes that on any device, slowly.

    Before `fully_shard` and before compilation. Raises ValueError for widths that FP8 products do not take.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if model.config.width % MULTIPLE:
        raise ValueError(f"--fp8 needs a width that {MULTIPLE} divides, this model's is {model.config.width}")
    for block in model.blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=emulate))
