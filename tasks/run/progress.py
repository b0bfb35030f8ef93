"""The counters of a run, all of which live in its checkpoints, and the sums of the metrics row that comes next."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Figures:
    """The names of the figures that a task measures.

    Attributes:
        target: one of the things that the loss is a mean over; throughput is counted in these.
        loss: the loss and its unit, for the curve's axis.
        training: what the training loss carries, for the curve's legend; the validation loss carries nothing.
        metric: the figure of a validation that chooses the best checkpoint.
        higher_is_better: the metric's direction.
    """

    target: str
    loss: str
    training: str
    metric: str = "valid_loss"
    higher_is_better: bool = False

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value of the metric is better than the best one so far."""
        return best is None or (value > best if self.higher_is_better else value < best)


NOISES = ("noise_within", "noise_between")  # of an update's result


@dataclass
class Progress:
    """The counters of a run.

    `unique_samples` counts the samples of all batches before they are repeated; a sample counts again in every epoch.
    `seen_instances` is M times that. `targets` counts what stood in the denominators, copies included. `best_value` is
    of the metric that chooses the best checkpoint. The `window_*` sums belong to the metrics row that comes next.
    """

    update: int = 0
    unique_samples: int = 0
    seen_instances: int = 0
    targets: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_update: int | None = None
    window_updates: int = 0
    window_loss: float = 0.0
    window_norm: float = 0.0
    window_clipped: int = 0
    window_noise: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NOISES})

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from `state`."""
        for counter in fields(self):
            if counter.name in state:  # a checkpoint of before it was counted lacks it
                setattr(self, counter.name, state[counter.name])

    def count(
        self, loss: float, norm: float, samples: int, targets: int, *, num_copies: int, max_norm: float | None
    ) -> None:
        """Add an update, of all ranks: its loss per target, unique samples, and targets of all copies.

        `norm` is the gradient's before clipping at `max_norm`; infinite where fp16's loss scaler skipped the step.
        """
        self.unique_samples += samples
        self.seen_instances += samples * num_copies
        self.targets += targets
        self.window_updates += 1
        self.window_loss += loss
        if math.isfinite(norm):
            self.window_norm += norm
            self.window_clipped += int(max_norm is not None and norm > max_norm)

    def note(self, name: str, value: Any) -> None:
        """Add a noise of an update where it was measured: a number, 0-dim, or None."""
        if value is not None and math.isfinite(number := float(value)):
            self.window_noise[name].append(number)

    def noises(self, measured: bool) -> dict[str, float | None]:
        """The window's mean of each noise, None where it has none; nothing where noises are not `measured`."""
        return {name: math.fsum(x) / len(x) if x else None for name, x in self.window_noise.items() if measured}

    def counts(self, figures: Figures) -> dict[str, int]:
        """The numbers of samples, instances and targets, by the names of `metrics.jsonl` and `results.json`."""
        return {
            "unique_samples": self.unique_samples,
            "seen_instances": self.seen_instances,
            f"target_{figures.target}s": self.targets,
        }

    def close_window(self, figures: Figures, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics row of the updates since the last one, with a task's own columns."""
        count = max(self.window_updates, 1)
        row = {
            "update": self.update,
            "loss": self.window_loss / count,
            **columns,
            "grad_norm": self.window_norm / count,
            "clip_fraction": self.window_clipped / count,
            **self.counts(figures),
            "seconds": round(self.seconds, 3),
        }
        self.window_updates = self.window_clipped = 0
        self.window_loss = self.window_norm = 0.0
        self.window_noise = {name: [] for name in NOISES}
        return row
