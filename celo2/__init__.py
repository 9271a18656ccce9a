"""Celo2: a learned optimizer for pretraining, as a drop-in `torch.optim.Optimizer`.

The update rule is that of "Celo2" (arXiv 2602.19142): a 347-parameter MLP maps the gradient statistics of every
parameter to an update direction. `FusedCelo2` is what a trainer uses; `Theta` holds the MLP's weights.
"""

from celo2.matrices import MatrixView
from celo2.optimizer import FusedCelo2
from celo2.routing import param_groups
from celo2.theta import Theta, load_weights

__version__ = "0.1.0"

__all__ = ["FusedCelo2", "MatrixView", "Theta", "__version__", "load_weights", "param_groups"]
