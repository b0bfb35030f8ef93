"""A translation model from a folder or the hub."""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from tasks.cli.errors import UserError
from tasks.models.pretrained import load_config_and_tokenizer, load_weights


def load_translator(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder-decoder and its tokenizer, on the processor and in evaluation mode.

    Args:
        name: a model folder of transformers, or a hub id.

    Raises:
        UserError: there is no such folder or hub id, it is no encoder-decoder, its weights are incomplete or damaged,
            it has no tokenizer, or one of another model.
    """
    config, tokenizer = load_config_and_tokenizer(name)
    if not config.is_encoder_decoder:
        raise UserError(f"--model {name} is a {config.model_type}, which is no encoder-decoder and cannot translate")
    return load_weights(name, AutoModelForSeq2SeqLM, tokenizer)[0], tokenizer
