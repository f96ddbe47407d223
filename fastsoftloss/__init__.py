"""fastsoftloss: fused robust classification loss. ``from fastsoftloss import Loss`` in place of ``CrossEntropyLoss``."""

from fastsoftloss.functional import LossComponents
from fastsoftloss.loss import Loss

__version__ = "0.1.0"
__all__ = ["Loss", "LossComponents"]
