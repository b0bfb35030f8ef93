"""The model of a task, with its tokenizer and the collator that makes its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tasks.errors import UserError
from tasks.finetuning.config import CAUSAL, CLASSIFICATION, SEQ2SEQ, TASKS, FinetuningConfig
from tasks.finetuning.generated import generate_model
from tasks.pretrained import load_config_and_tokenizer, load_weights

_LOADERS: dict[str, Any] = {
    SEQ2SEQ: AutoModelForSeq2SeqLM,
    CAUSAL: AutoModelForCausalLM,
    CLASSIFICATION: AutoModelForSequenceClassification,
}


def task_of(config: FinetuningConfig, model_config: PreTrainedConfig | None) -> str:
    """The task that was asked for, or the one that the model's head is for.

    Raises:
        UserError: neither says, or the model cannot do it.
    """
    if config.task is not None:
        if model_config is not None and config.task != CLASSIFICATION:
            _check_kind(config, model_config.is_encoder_decoder)
        return config.task
    if model_config is None:
        return SEQ2SEQ
    heads = model_config.architectures or [""]
    if heads[0].endswith("ForSequenceClassification"):
        return CLASSIFICATION
    if model_config.is_encoder_decoder:
        return SEQ2SEQ
    if heads[0].endswith(("ForCausalLM", "LMHeadModel")):
        return CAUSAL
    raise UserError(
        f"--model {config.model} is a {heads[0] or model_config.model_type}, which says no task: give --task, one of "
        f"{', '.join(TASKS)}"
    )


def _check_kind(config: FinetuningConfig, is_encoder_decoder: bool) -> None:
    if config.task == SEQ2SEQ and not is_encoder_decoder:
        raise UserError(f"--task {SEQ2SEQ} needs an encoder-decoder, and --model {config.model} is none")
    if config.task == CAUSAL and is_encoder_decoder:
        raise UserError(f"--task {CAUSAL} needs a decoder alone, and --model {config.model} is an encoder-decoder")


def load_model(
    config: FinetuningConfig, task: str, classes: Sequence[str], seed: int, say: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, with a padding token; a classifier gets `classes`.

    Raises:
        UserError: the folder lacks a part, or its model is not for the task.
    """
    if config.model is None:
        return generate_model(task, config.cache_dir, seed)
    _, tokenizer = load_config_and_tokenizer(config.model)
    more: dict[str, Any] = {}
    if task == CLASSIFICATION:
        names = dict(enumerate(classes))
        more = {"num_labels": len(classes), "id2label": names, "label2id": {name: n for n, name in names.items()}}
        more["ignore_mismatched_sizes"] = True  # a head for other classes is made anew
    model, new = load_weights(config.model, _LOADERS[task], tokenizer, new_head=task == CLASSIFICATION, **more)
    if new:
        say(f"{len(new)} weights are new: {', '.join(new)}")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"--model {config.model}: its tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # classifiers look for a row's last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def collator_for(task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Pads a batch; labels that are tokens with -100, and with the decoder's inputs where there is a decoder."""
    if task == CLASSIFICATION:
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model if task == SEQ2SEQ else None)
