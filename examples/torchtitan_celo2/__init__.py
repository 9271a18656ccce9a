r"""FusedCelo2 for torchtitan 0.3: put this folder where Python finds it, and name it as the module.

    PYTHONPATH=examples torchrun --nproc-per-node 8 -m torchtitan.train \
        --module torchtitan_celo2 --config llama3_debugmodel_celo2

torchtitan's program needs GPUs, a tokenizer (`--hf_assets_path`) and Triton. For the real size take another
configuration of `config_registry.py`, or write yours there: any of torchtitan's with `config.optimizer =
celo2_optimizer(lr=...)`.
"""

from dataclasses import dataclass

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from celo2 import FusedCelo2


class Celo2Container(OptimizersContainer):
    """torchtitan's optimizers, FusedCelo2 among them."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's: `build` makes the container that the configuration is of."""

    @staticmethod
    def _resolve_optimizer_factory(name):
        return FusedCelo2 if name == "FusedCelo2" else OptimizersContainer._resolve_optimizer_factory(name)


def celo2_optimizer(lr: float, **options: object) -> OptimizersContainer.Config:
    """All parameters under FusedCelo2, which routes them by the names that torchtitan gives them."""
    options = {"lr": lr, **options}
    group = ParamGroupConfig(pattern=".*", optimizer_name="FusedCelo2", optimizer_kwargs=options)
    return Celo2Container.Config(param_groups=[group])
