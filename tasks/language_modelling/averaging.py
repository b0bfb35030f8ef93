"""NT-ASGD (Merity et al. 2018, §3): SGD, until validation stops to improve; from then on averaged SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class NonMonotonicASGD(torch.optim.ASGD):
    """SGD that `begin_averaging` turns into `torch.optim.ASGD(lr, t0=0, lambd=0)` of the same weights.

    The average has equal parts of all weights after the second averaged step on: torch's ASGD uses the rate and the
    averaging weight that it computed one step before. So from the second averaged step on, a rate that changes with
    every update (by the length of its window) acts one update late, in the original as here.

    Args:
        params: of the model, in one group.
        lr: eta.
        weight_decay: lambda of an L2 penalty, added to the gradient after clipping.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, lambd=0.0, t0=0.0, weight_decay=weight_decay)
        self.param_groups[0]["averages"] = False  # saved with the groups

    @property
    def averages(self) -> bool:
        """Whether averaging has begun."""
        return bool(self.param_groups[0]["averages"])

    def begin_averaging(self) -> None:
        """Average the weights from the next step on."""
        self.param_groups[0]["averages"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the method in force."""
        if self.averages:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is not None:
                step = parameter.grad.add(parameter, alpha=group["weight_decay"])
                parameter.add_(step, alpha=-group["lr"])
        return loss

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the parameters are the averages, where there are any; what a block writes into them is lost."""
        averages: dict[Tensor, Tensor] = {p: state["ax"] for p, state in self.state.items() if "ax" in state}
        own = {parameter: parameter.detach().clone() for parameter in averages}
        try:
            for parameter, average in averages.items():
                parameter.data.copy_(average)
            yield
        finally:
            for parameter, weight in own.items():
                parameter.data.copy_(weight)


class NonMonotonicTrigger:
    """Says when averaging begins: a validation is worse than the best of all those before the last n (algorithm 1).

    Validations are counted, and they come every so many updates: epochs, whose number of updates moves with the batch,
    have no part in it.

    Args:
        patience: n.

    >>> trigger = NonMonotonicTrigger(2)
    >>> [trigger.fires(loss) for loss in (5.0, 4.0, 4.5, 4.6, 4.1)]
    [False, False, False, False, True]
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._losses: list[float] = []

    def fires(self, loss: float) -> bool:
        """Note a validation's loss, and say whether averaging begins after it."""
        earlier = self._losses[: max(0, len(self._losses) - self.patience)]
        self._losses.append(loss)
        return bool(earlier) and loss > min(earlier)

    def state_dict(self) -> dict[str, Any]:
        """All losses so far."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind them."""
        self._losses = list(state["losses"])
