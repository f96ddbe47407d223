"""The module: a drop-in for ``torch.nn.CrossEntropyLoss``."""

from __future__ import annotations

from torch import Tensor, nn

from fastsoftloss import functional


class Loss(nn.Module):
    """Cross-entropy plus a penalty on the diversity of the softmax over the non-true classes (arXiv:2303.12363).

    A drop-in for :class:`torch.nn.CrossEntropyLoss`, and ``(y_a, y_b, mix)`` is a target too. The arguments are those of
    :func:`fastsoftloss.functional.cross_entropy`, which see for shapes, dtypes, units and errors; ``weight`` is a buffer.

        criterion = Loss()
        loss = criterion(logits, target)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        diversity: str | None = "logit_variance",
        diversity_weight: float = 1.0,
        z_loss: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        functional.options_of(ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.diversity = diversity
        self.diversity_weight = diversity_weight
        self.z_loss = z_loss
        self.backend = backend

    def forward(self, logits: Tensor, target: functional.Target, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` against ``target``; ``sample_weight`` has the shape of class indices."""
        options = functional.options_of(
            self.ignore_index, self.reduction, self.label_smoothing, self.diversity, self.diversity_weight, self.z_loss
        )
        buffers = self._buffers  # read without the detour that a module's attributes take, unless the weight became something else
        weight = buffers["weight"] if "weight" in buffers else self.weight  # noqa: SIM401
        return functional.apply(logits, target, weight, sample_weight, options, False, self.backend)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        weight = "" if self.weight is None else f"weight={tuple(self.weight.shape)}, "
        return (
            f"{weight}ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"diversity={self.diversity!r}, diversity_weight={self.diversity_weight}, z_loss={self.z_loss}, backend={self.backend!r}"
        )
