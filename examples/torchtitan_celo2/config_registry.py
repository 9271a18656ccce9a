"""Configurations of torchtitan with FusedCelo2: those of Llama 3, with another optimizer.

For another model replace what is called; for another size, and everything else, the flags of torchtitan work as
always (`--training.steps 1000 --parallelism.data-parallel-shard-degree 8`). Half of AdamW's rate is where a sweep
begins (docs/learning-rates.md).
"""

from torchtitan.models.llama3.config_registry import llama3_8b, llama3_debugmodel
from torchtitan.trainer import Trainer

from . import celo2_optimizer


def llama3_debugmodel_celo2() -> Trainer.Config:
    """torchtitan's smallest Llama, at half of its AdamW rate of 8e-4."""
    config = llama3_debugmodel()
    config.optimizer = celo2_optimizer(lr=4e-4)
    return config


def llama3_8b_celo2() -> Trainer.Config:
    """Llama 3 8B, at half of AdamW's 3e-4 with twice its decay; not run by us."""
    config = llama3_8b()
    config.optimizer = celo2_optimizer(lr=1.5e-4, weight_decay=0.2)
    return config
