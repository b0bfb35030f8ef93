"""The counters of a run, all of which live in its checkpoints, and the sums of the metrics row that comes next."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """What a run has done.

    `unique_samples` counts samples met, `seen_instances` their copies, `target_tokens` the targets in the
    denominators (copies counted). The `window_*` sums belong to the metrics row that comes next.
    """

    update: int = 0
    unique_samples: int = 0
    seen_instances: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_update: int | None = None
    window_updates: int = 0
    window_loss: float = 0.0
    window_norm: float = 0.0
    window_clipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from `state`."""
        for counter in fields(self):
            setattr(self, counter.name, state[counter.name])

    def count(
        self, *, loss: float, norm: float, samples: int, targets: int, num_copies: int, max_norm: float | None
    ) -> None:
        """Add an update.

        Args:
            loss: nats per target, this rank's share of the mean.
            norm: of the gradient before clipping; infinite where fp16's loss scaler skipped the step.
            samples: unique samples of all ranks.
            targets: targets of all ranks and copies.
            num_copies: M.
            max_norm: the clipping threshold.
        """
        self.unique_samples += samples
        self.seen_instances += samples * num_copies
        self.target_tokens += targets
        self.window_updates += 1
        self.window_loss += loss
        if math.isfinite(norm):
            self.window_norm += norm
            self.window_clipped += int(max_norm is not None and norm > max_norm)

    def close_window(self, *, lr: float) -> dict[str, Any]:
        """The metrics row of the updates since the last one; its loss is still this rank's share."""
        count = max(self.window_updates, 1)
        row = {
            "update": self.update,
            "loss": self.window_loss / count,
            "lr": lr,
            "grad_norm": self.window_norm / count,
            "clip_fraction": self.window_clipped / count,
            "unique_samples": self.unique_samples,
            "seen_instances": self.seen_instances,
            "target_tokens": self.target_tokens,
            "seconds": round(self.seconds, 3),
        }
        self.window_updates = self.window_clipped = 0
        self.window_loss = self.window_norm = 0.0
        return row

    def note_validation(self, loss: float) -> None:
        """Remember the lowest validation loss (nats per target) and its update."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_update = loss, self.update
