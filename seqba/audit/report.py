"""The result of an audit: the operations, their table, and the check before training."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PER_COPY = "per copy"
SHARED = "shared"
INACTIVE = "inactive"
_TOTAL_EFFECTS = "total effects, each with its interactions, so that they may add up to more than 100 %"


@dataclass(frozen=True)
class Operation:
    """One random operation of a model; repeated layers count as one.

    Attributes:
        path: the dotted path of the module whose code draws, repeated layers folded:
            `model.encoder.layers.{0-5}.self_attn`. Empty for the model's own forward.
        paths: all those modules, one by one.
        kind: `dropout`, `attention dropout`, `LayerDrop`, `stochastic depth`, `bernoulli` ...
        probability: lowest and highest probability of zeroing (of a one, for a plain `torch.bernoulli`); None where
            none is known.
        scope: `per copy`, `shared` (one draw for all copies of a pass) or `inactive`.
        calls: its draws in one forward pass of all copies; for an inactive one, how often it was called. Draws of
            Python's and numpy's generators are counted by the places between two module calls in which they fell.
        variance_share: its total-effect share of the output's variance over the copies, 0 to 1: 0 where draws are
            shared or inactive, None where it was not measured. Shares may add up to more than 1.
        reason: why it is inactive (`p=0`, `eval mode`), empty otherwise.
    """

    path: str
    paths: tuple[str, ...]
    kind: str
    probability: tuple[float, float] | None
    scope: str
    calls: int
    variance_share: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind} in {self.path or 'the model itself'}"


@dataclass(frozen=True)
class MaskAudit:
    """Which random operations of a model are per copy, shared by the copies or inactive. Printed, it is a table.

    Attributes:
        model: the model's class.
        num_copies: M of the audited pass.
        num_samples: B of the audited pass.
        operations: active ones first, in the order of the model.
        variance_note: why no share of variance was measured, empty where it was.
    """

    model: str
    num_copies: int
    num_samples: int
    operations: list[Operation]
    variance_note: str = ""

    @property
    def active(self) -> list[Operation]:
        """The operations that draw."""
        return [operation for operation in self.operations if operation.scope != INACTIVE]

    @property
    def shared(self) -> list[Operation]:
        """The operations that draw once for all copies of a pass."""
        return [operation for operation in self.operations if operation.scope == SHARED]

    @property
    def any_random(self) -> bool:
        """Whether anything draws."""
        return bool(self.active)

    @property
    def copies_differ(self) -> bool:
        """Whether some operation draws per copy."""
        return any(operation.scope == PER_COPY for operation in self.operations)

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        if not self.any_random:
            why = _reasons(self.operations)
            cost = "M copies cost M times as much for nothing"
            return f"The copies are identical: nothing random is active{why}, so {cost}."
        shared = ", ".join(str(operation) for operation in self.shared)
        if not self.copies_differ:
            return f"The copies of one pass are identical: every draw is shared by them ({shared})."
        return "The copies differ" + (f"; shared by the copies of a pass: {shared}." if shared else ".")

    @property
    def _has_shares(self) -> bool:
        return any(one.scope == PER_COPY and one.variance_share is not None for one in self.operations)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "model": self.model,
            "num_copies": self.num_copies,
            "num_samples": self.num_samples,
            "any_random": self.any_random,
            "copies_differ": self.copies_differ,
            "verdict": self.verdict,
            "variance_note": self.variance_note,
            "operations": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(operation).items()}
                for operation in self.operations
            ],
        }

    def __str__(self) -> str:
        size = f"{self.num_copies} copies of {self.num_samples} samples"
        lines = [f"Random operations of {self.model} in training mode, {size}", ""]
        if self.operations:
            head = ("module", "kind", "p", "calls", "draws", "variance")
            lines += [*_aligned([head, *(_cells(operation) for operation in self.operations)]), ""]
        if note := self.variance_note or (_TOTAL_EFFECTS if self._has_shares else ""):
            lines += [f"Shares of the variance: {note}.", ""]
        return "\n".join([*lines, self.verdict])


class IdenticalCopiesError(ValueError):
    """Training with M > 1 would repeat every sample M times with nothing random between the copies.

    The message holds the table and the reason; `audit` is what was found.
    """

    def __init__(self, audit: MaskAudit) -> None:
        super().__init__(
            f"{audit}\n\nSwitch a dropout on, augment the input itself, use one copy, or pass "
            "allow_identical_copies=True where identical copies are wanted."
        )
        self.audit = audit


def check_copies_differ(audit: MaskAudit) -> None:
    """Refuse copies between which nothing random is active; warn where all that is random is shared by them.

    Shared draws differ between passes, so that copies in passes of their own may differ where copies in one
    pass do not: that is a warning.

    Raises:
        IdenticalCopiesError: nothing is random; the message holds the table and the reason.
    """
    if audit.copies_differ:
        return
    if not audit.any_random:
        raise IdenticalCopiesError(audit)
    names = ", ".join(str(operation) for operation in audit.shared)
    warnings.warn(
        f"every random draw is shared by the copies of a pass ({names}): the {audit.num_copies} copies of a sample are "
        "identical there, and differ only where they run in different passes without reproducible copies",
        UserWarning,
        stacklevel=2,
    )


def folded_path(paths: Iterable[str]) -> str:
    """One path for modules whose paths differ in numbers only.

    >>> folded_path(["encoder.layers.0.drop", "encoder.layers.1.drop", "encoder.layers.3.drop"])
    'encoder.layers.{0-1,3}.drop'
    """
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_folded(list(dict.fromkeys(column))) for column in columns)


def path_pattern(path: str) -> str:
    """A path with its numbers taken out: layers of one stack have the same.

    >>> path_pattern("encoder.layers.11.drop")
    'encoder.layers.*.drop'
    """
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _folded(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, parts)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _cells(operation: Operation) -> tuple[str, ...]:
    modules = f" x{len(operation.paths)}" if len(operation.paths) > 1 else ""
    probability = ""
    if operation.probability is not None:
        probability = " to ".join(f"{p:.3g}" for p in dict.fromkeys(operation.probability))
    share = "" if operation.variance_share is None else f"{100 * operation.variance_share:.1f} %"
    share = "" if operation.scope == INACTIVE else share
    scope = operation.scope if not operation.reason else f"{operation.scope} ({operation.reason})"
    path = operation.path or "(the model itself)"
    return path + modules, operation.kind, probability, str(operation.calls), scope, share


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = (str.ljust, str.ljust, str.ljust, str.rjust, str.ljust, str.rjust)  # numbers: calls, variance
    lines = [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _reasons(operations: Iterable[Operation]) -> str:
    reasons = dict.fromkeys(operation.reason for operation in operations if operation.reason)
    return f" ({', '.join(reasons)})" if reasons else ""
