"""A language model with its loss inside, over windows whose hidden states are carried on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seqba.carried import CarriedState
from seqba.loss import linear_cross_entropy
from seqba.modules import activation_regularisation, temporal_activation_regularisation
from tasks.language_modelling.model import AwdLstmForCausalLM, State


class LanguageModelLoss(nn.Module):
    """An AWD-LSTM with its loss inside, so that one forward call (and DDP's hooks) hold both.

    Args:
        model: what is trained.
        alpha: weight of AR, on the dropped last output, in training mode only.
        beta: weight of TAR, on the raw one, in training mode only.
    """

    def __init__(self, model: AwdLstmForCausalLM, *, alpha: float = 0.0, beta: float = 0.0) -> None:
        super().__init__()
        self.model, self.alpha, self.beta = model, alpha, beta

    def forward(self, batch: dict[str, Tensor], state: State | None = None) -> tuple[Tensor, State]:
        """Summed nats over the targets, and in training the regularisers times their number.

        Args:
            batch: `input_ids` and `labels` (rows, T), of which position t of one is followed by position t of the
                other; a label of -100 is none. In training every position has a target.
            state: before the window, as `AwdLstmModel.forward` takes it.

        Returns:
            The loss, 0-dim, and the state after the window.
        """
        output: Any = self.model.model(batch["input_ids"], state)
        head, labels = self.model.lm_head, batch["labels"]
        loss = linear_cross_entropy(output.last_hidden_state, head.weight, labels, bias=head.bias)
        if self.training and self.alpha:
            loss = loss + self.alpha * activation_regularisation(output.last_hidden_state, labels.numel())
        if self.training and self.beta:
            loss = loss + self.beta * temporal_activation_regularisation(output.raw_hidden_state, labels.numel())
        return loss, output.state


class CarriedLoss:
    """The `loss_fn` of `seqba.TrainStep` for a prepared `LanguageModelLoss`: it takes and keeps hidden states."""

    def __init__(self, carried: CarriedState) -> None:
        self.carried = carried

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a pass's rows."""
        loss, state = model(batch, self.carried.take(len(batch["input_ids"])))
        self.carried.keep(state)
        return loss


def count_labels(batch: dict[str, Tensor]) -> int:
    """The `count_fn` of `seqba.TrainStep` beside it: every position has a target."""
    return batch["labels"].numel()
