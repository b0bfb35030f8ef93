"""Transformer-base's family, said in transformers' words: an encoder-decoder `MarianMTModel` and its loss."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from seqba.loss import linear_cross_entropy


def build_model(
    *,
    vocab_size: int,
    width: int,
    ffn_width: int,
    num_layers: int,
    num_heads: int,
    dropout: float,
    attention_dropout: float,
    activation_dropout: float,
    pad_token_id: int,
    eos_token_id: int,
    max_length: int,
) -> MarianMTModel:
    """The Transformer of Vaswani et al. 2017 as a `MarianMTModel` with new weights.

    Post-norm, ReLU, sinusoidal positions, embeddings times sqrt(D), all three embeddings tied. Four dropouts are
    set, each on its own: embeddings and residual branches (`dropout`), attention weights, and inside the
    feed-forward layers; they are the random transform T of Batch Augmentation. `init_std` is D^-0.5, so that the
    scaled embeddings and the tied output layer start at unit scale (transformers' 0.02 learns slowly).

    Args:
        vocab_size: V.
        width, ffn_width: D, and the inner width of the feed-forward layers.
        num_layers: of the encoder, and of the decoder.
        num_heads: H.
        dropout, attention_dropout, activation_dropout: probabilities of zeroing.
        pad_token_id: also starts the decoder.
        eos_token_id: ends a sentence.
        max_length: positions; the longest sentence in pieces, on either side.
    """
    config = MarianConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_ffn_dim=ffn_width,
        decoder_ffn_dim=ffn_width,
        encoder_layers=num_layers,
        decoder_layers=num_layers,
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        activation_function="relu",
        dropout=dropout,
        attention_dropout=attention_dropout,
        activation_dropout=activation_dropout,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        init_std=width**-0.5,
        max_position_embeddings=max_length,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        bos_token_id=None,
        decoder_start_token_id=pad_token_id,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config)


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


@torch.no_grad()
def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
