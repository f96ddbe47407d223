"""fastsoftloss: fused robust classification loss. ``from fastsoftloss import Loss`` in place of ``CrossEntropyLoss``."""

from fastsoftloss._version import __version__
from fastsoftloss.functional import LossComponents
from fastsoftloss.loss import Loss

__all__ = ["Loss", "LossComponents", "__version__"]
