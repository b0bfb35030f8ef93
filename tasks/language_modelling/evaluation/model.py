"""A causal language model as what an evaluation asks of it: the nats of given tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from seqba.loss import IGNORE_INDEX
from tasks.cli.errors import UserError
from tasks.decoding.mc_dropout import dropout_on
from tasks.models.pretrained import explaining, load_config_and_tokenizer, load_weights

_PROBED = 8  # tokens on which a model is tried
_MAX_LOGITS = 2**24  # numbers at once, 64 MB in float32


class CausalModel:
    """A causal model of transformers that gives the nats of its targets, of any family.

    The output layer is applied to so many positions at a time that logits take 64 MB, where the model's logits are that
    layer's output and no more; where they are (scaled or soft-capped ones), logits of one call exist at once. What a
    model is like is tried on a few tokens.

    Args:
        model: in evaluation mode.
        called: the model's name in messages.

    Attributes:
        vocab_size: rows of the embedding.
        is_recurrent: whether it takes a state and gives one back, so that a text can be read in calls of any length.

    Raises:
        UserError: the model reads the tokens that it is to predict, or predicts none.
    """

    def __init__(self, model: PreTrainedModel, called: str) -> None:
        self.model, self.vocab_size = model, model.get_input_embeddings().weight.shape[0]
        self._head: nn.Linear | None = None
        self.is_recurrent = False
        with torch.inference_mode():
            rows = self._probe()
            with explaining(f"--model {called}: its {type(model).__name__} cannot be run on token ids alone"):
                logits = self._run(model, rows).logits
            if bool(logits.isnan().any()):
                raise UserError(f"--model {called} predicts no numbers (NaN): its weights are damaged")
            if not _is_close(logits[0, :-1], logits[1, :-1], logits):
                raise UserError(
                    f"--model {called}: what this {type(model).__name__} predicts at a position depends on the tokens "
                    "after it, so that it is no causal language model; a perplexity of it would mean nothing"
                )
            self._head = self._linear_head(rows, logits)
            self.is_recurrent = self._carries_state(rows, logits)

    @property
    def max_positions(self) -> int | None:
        """How many tokens it takes at once, where there is a limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if limit and limit > 0 else None

    def nats(self, input_ids: Tensor, labels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """-log p of each label that is not -100, in nats, and the state after the inputs.

        Args:
            input_ids: (rows, T).
            labels: (rows, T), what follows each input; -100 where it is not asked for.
            state: of a recurrent model, before the inputs; None for its own beginning.

        Returns:
            (labels asked for,), row after row, float32 or better; and the state, None of other models.
        """
        asked = labels != IGNORE_INDEX
        output = self._run(self.model if self._head is None else self.model.base_model, input_ids, state)
        values = (output.logits if self._head is None else output.last_hidden_state)[asked]
        rows = max(1, _MAX_LOGITS // self.vocab_size)
        found = []
        for part, targets in zip(values.split(rows), labels[asked].split(rows), strict=True):
            logits = part if self._head is None else self._head(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            found.append(cross_entropy(logits, targets, reduction="none"))
        return torch.cat(found), output.state if self.is_recurrent else None

    @torch.inference_mode()
    def is_random(self) -> bool:
        """Whether two passes over equal rows differ in training mode; the generators stay as they were."""
        rows, device = self._probe(), self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), dropout_on(self.model):
            first, second = (self._run(self.model, rows).logits for _ in range(2))
        return not torch.equal(first, second)

    def _probe(self) -> Tensor:
        """Two rows that differ in the last token alone."""
        length = min(_PROBED, self.max_positions or _PROBED)
        rows = torch.arange(length, device=self.model.device).repeat(2, 1)
        rows[1, -1] += 1
        return rows % self.vocab_size

    def _run(self, network: Any, input_ids: Tensor, state: Any = None) -> Any:
        more: dict[str, Any] = {"state": state, "use_cache": True} if self.is_recurrent else {"use_cache": False}
        return network(input_ids=input_ids, return_dict=True, **more)

    def _linear_head(self, rows: Tensor, logits: Tensor) -> nn.Linear | None:
        """The output layer, where it makes the model's logits out of the last hidden states alone."""
        head, base = self.model.get_output_embeddings(), self.model.base_model
        if not isinstance(head, nn.Linear) or base is self.model:
            return None
        hidden = getattr(self._run(base, rows), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.in_features:
            return None
        own = head(hidden)
        return head if own.shape == logits.shape and _is_close(own, logits, logits) else None

    def _carries_state(self, rows: Tensor, logits: Tensor) -> bool:
        """Whether a second call, given the state of a first, goes on as one call does."""
        half = rows.shape[1] // 2
        if "state" not in inspect.signature(self.model.forward).parameters or not half:
            return False
        first = self.model(input_ids=rows[:, :half], use_cache=True, return_dict=True)
        if getattr(first, "state", None) is None:
            return False
        second = self.model(input_ids=rows[:, half:], state=first.state, use_cache=True, return_dict=True)
        return _is_close(second.logits, logits[:, half:], logits)


def load_causal(path: str, called: str) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a causal model and its tokenizer.

    Raises:
        UserError: there are none, they do not fit together, or the model is not causal.
    """
    config, tokenizer = load_config_and_tokenizer(path)
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--model {path} is a {config.model_type}, of which transformers has no causal language model")
    return CausalModel(load_weights(path, AutoModelForCausalLM, tokenizer)[0], called), tokenizer


def _is_close(x: Tensor, y: Tensor, scale: Tensor) -> bool:
    """Equal but for rounding."""
    rounding = max(torch.finfo(scale.dtype).eps, torch.finfo(torch.float32).eps)  # some keep a part in float32
    limit = rounding**0.5 * float(scale[scale.isfinite()].abs().max())
    return torch.allclose(x, y, rtol=0, atol=limit)
