"""Counters of a Trainer's run, kept with its state: samples met, instances seen, targets, and their rates."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

_NONE = {"unique_samples": 0, "seen_instances": 0, "target_tokens": 0, "copies_per_pass": 0}


class BatchAugmentationCounters(TrainerCallback, ExportableState):
    """Counts over the whole run, resumed ones included; in `trainer_state.json` under `stateful_callbacks`.

    Attributes:
        unique_samples: samples met (rows; in packed batches sequences), each counted once an epoch.
        seen_instances: their copies, M times as many.
        target_tokens: the targets in the denominators, copies counted; for losses over samples, instances.
        copies_per_pass: the K in use, which "auto" may have come to; 0 before the first update.
    """

    def __init__(
        self, unique_samples: int = 0, seen_instances: int = 0, target_tokens: int = 0, copies_per_pass: int = 0
    ) -> None:
        self.unique_samples, self.seen_instances = unique_samples, seen_instances
        self.target_tokens, self.copies_per_pass = target_tokens, copies_per_pass
        self._unique_at_start, self._seen_at_start = unique_samples, seen_instances

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        counts = {
            "unique_samples": int(self.unique_samples),
            "seen_instances": int(self.seen_instances),
            "target_tokens": int(self.target_tokens),
            "copies_per_pass": self.copies_per_pass,
        }
        return {"args": counts, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the state's counts, or from zero where it has none."""
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(stored, list):
            stored = stored[0]
        for name, value in {**_NONE, **(stored or {}).get("args", {})}.items():
            setattr(self, name, value)
        self._unique_at_start, self._seen_at_start = int(self.unique_samples), int(self.seen_instances)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def add(self, samples: Any, targets: Any, num_copies: int) -> None:
        """Count an update: its samples and targets over all ranks, before repetition."""
        self.unique_samples = self.unique_samples + samples
        self.seen_instances = self.seen_instances + num_copies * samples
        self.target_tokens = self.target_tokens + num_copies * targets

    def logs(self, seconds: float | None) -> dict[str, float]:
        """The figures of a line of the log: the counts and, once the training time is known, samples per second."""
        unique, seen = int(self.unique_samples), int(self.seen_instances)
        logs: dict[str, float] = {
            "unique_samples": unique,
            "seen_instances": seen,
            "target_tokens": int(self.target_tokens),
        }
        if seconds:
            logs["unique_samples_per_second"] = round((unique - self._unique_at_start) / seconds, 3)
            logs["seen_instances_per_second"] = round((seen - self._seen_at_start) / seconds, 3)
        return logs
