"""A classifier with its loss inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqba.transforms import mix_rows
from tasks.vision.pipelines import Batch

_AUXILIARY_WEIGHT = 0.4  # of an auxiliary classifier's loss (Liu et al. 2019, "DARTS", appendix A)


class VisionLoss(nn.Module):
    """A classifier with its loss inside, so that one forward call (and DDP's hooks) hold both.

    Args:
        model: images (rows, C, H, W) -> logits (rows, classes); in training mode it may give two, the second of an
            auxiliary classifier, whose loss is added with weight 0.4.
        label_smoothing: probability spread over all classes, in training mode only.
        mixing_layers: of the model, in front of which manifold mixup may mix.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, mixing_layers: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.model, self.label_smoothing, self.mixing_layers = model, label_smoothing, tuple(mixing_layers)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed nats, 0-dim, in float32, and how many images have their label first.

        Args:
            batch: `images`, `labels` (rows,), and under mixup `partner_labels` (rows,) and `proportions` (rows,): a
                row's share of its own label; under manifold mixup `partners` (rows,) and `layer`, an index of
                `mixing_layers`.
        """
        with self._mixing(batch):
            logits, auxiliary = self.model(batch["images"]), None
        if isinstance(logits, tuple):
            logits, auxiliary = logits
        nats = self._nats(logits, batch)
        if auxiliary is not None:
            nats = nats + _AUXILIARY_WEIGHT * self._nats(auxiliary, batch)
        return nats, (logits.argmax(1) == batch["labels"]).sum()

    @contextmanager
    def _mixing(self, batch: Batch) -> Iterator[None]:
        """Inside, what goes into the batch's layer is mixed (Verma et al. 2019, "Manifold Mixup", section 2)."""
        if "layer" not in batch:
            yield
            return
        hook = self.mixing_layers[batch["layer"]].register_forward_pre_hook(
            lambda _, inputs: (mix_rows(inputs[0], batch["partners"], batch["proportions"]), *inputs[1:])
        )
        try:
            yield
        finally:
            hook.remove()

    def _nats(self, logits: Tensor, batch: Batch) -> Tensor:
        """Summed nats of logits (rows, classes)."""
        logits, labels = logits.float(), batch["labels"]
        smoothing = self.label_smoothing if self.training else 0.0
        if "proportions" not in batch:
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        own, other = (
            F.cross_entropy(logits, which, reduction="none", label_smoothing=smoothing)
            for which in (labels, batch["partner_labels"])
        )
        return torch.lerp(other, own, batch["proportions"]).sum()


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The `loss_fn` of `seqba.TrainStep` for a prepared `VisionLoss`."""
    loss: Tensor = model(batch)[0]
    return loss


def count_labels(batch: Batch) -> int:
    """The `count_fn` beside it: a target an image."""
    return len(batch["labels"])
