"""Celo2: a learned optimizer for pretraining, as a drop-in `torch.optim.Optimizer`.

The update rule is that of "Celo2" (arXiv 2602.19142): a 347-parameter MLP maps the gradient statistics of every
parameter to an update direction. `FusedCelo2` is what a trainer uses; `Theta` holds the MLP's weights. `VeLO` (arXiv
2211.09760) is the learned optimizer that it is compared with.
"""

from celo2.matrices import MatrixView
from celo2.optimizer import FusedCelo2
from celo2.publish import push_theta, save_pylo
from celo2.routing import param_groups
from celo2.theta import Theta, load_weights
from celo2.velo import VeLO
from celo2.velo_weights import VeLOWeights, load_velo_weights

__version__ = "0.1.0"

__all__ = [
    "FusedCelo2",
    "MatrixView",
    "Theta",
    "VeLO",
    "VeLOWeights",
    "__version__",
    "load_velo_weights",
    "load_weights",
    "param_groups",
    "push_theta",
    "save_pylo",
]
