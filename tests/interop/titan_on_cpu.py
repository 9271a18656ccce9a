"""torchtitan's own program on a CPU; what it asks of a GPU alone is replaced.

It takes the first accelerator of PyTorch for its device, reads that device's memory, and attends by FlexAttention,
which has no backward pass on CPUs: here by PyTorch's attention, causal over the whole sequence. Gloo has no timeout to
set.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import common  # noqa: F401 - declares operators of torchvision
import torch
import torch._utils
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Any]:
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attended, SimpleNamespace(lse=None)


def main() -> None:
    # read when torchtitan is imported
    torch._utils._get_available_device_type = lambda: "cpu"
    from torchtitan import train, trainer
    from torchtitan.components import metrics
    from torchtitan.models.common.attention import FlexAttention

    nothing = metrics.DeviceMemStats(*[0.0] * len(metrics.DeviceMemStats._fields))
    monitor = {"reset_peak_stats": lambda: None, "get_peak_stats": lambda: nothing}
    metrics.build_device_memory_monitor = lambda: SimpleNamespace(device_name="cpu", device_capacity=1, **monitor)
    FlexAttention.compiled_flex_attn = staticmethod(attention)
    trainer.dist_utils.set_pg_timeouts = lambda **_: None
    torch.set_num_threads(1)
    train.main()


if __name__ == "__main__":
    main()
