"""A translation model with its loss inside, and how it decodes."""

from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, MarianMTModel

from seqba.loss import count_targets, linear_cross_entropy


def decoding_config(
    model: MarianMTModel, *, num_beams: int, length_penalty: float, max_length: int
) -> GenerationConfig:
    """How the model folder decodes by default: beam search, never emitting the padding that starts the decoder."""
    return GenerationConfig(
        max_length=max_length,
        **({"num_beams": num_beams, "length_penalty": length_penalty} if num_beams > 1 else {}),
        bad_words_ids=[[model.config.pad_token_id]],
        pad_token_id=model.config.pad_token_id,
        eos_token_id=model.config.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
    )


class TranslationLoss(nn.Module):
    """A translation model with its loss inside, so that one forward call (and DDP's hooks) hold both.

    Args:
        model: a `MarianMTModel`, or another with `.model`, `.lm_head` and `final_logits_bias` (BART).
        label_smoothing: eps, in training mode only.
    """

    def __init__(self, model: MarianMTModel, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        # a buffer that training never moves; of a model made here it is zero and need not be added
        self.has_bias = bool(model.final_logits_bias.any())

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed nats over all target tokens: `input_ids` (B, S), `decoder_input_ids` and `labels` (B, T) -> ()."""
        output: Any = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            use_cache=False,
        )
        return linear_cross_entropy(
            output.last_hidden_state,
            self.model.lm_head.weight,
            batch["labels"],
            bias=self.model.final_logits_bias if self.has_bias else None,
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The `loss_fn` of `seqba.TrainStep` for a prepared `TranslationLoss`."""
    return model(batch)


def count_labels(batch: dict[str, Tensor]) -> Tensor:
    """The `count_fn` of `seqba.TrainStep` beside it."""
    return count_targets(batch["labels"])


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
