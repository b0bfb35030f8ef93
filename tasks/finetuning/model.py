"""The model of a task, with its tokenizer and the collator that makes its batches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tasks.cli.errors import UserError
from tasks.finetuning.config import CAUSAL, CLASSIFICATION, SEQ2SEQ, TASKS, FinetuningConfig
from tasks.models.pretrained import explaining, load_weights, use_languages

logger = logging.getLogger(__name__)

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
    if model_config is None:
        return config.task or SEQ2SEQ
    if config.task is not None:
        _check_kind(config, model_config)
        return config.task
    head = (model_config.architectures or [""])[0]
    if _classifies(model_config):
        return CLASSIFICATION
    if model_config.is_encoder_decoder:
        return SEQ2SEQ
    if head.endswith(("ForCausalLM", "LMHeadModel")) and not _is_encoder(model_config):
        return CAUSAL
    raise UserError(
        f"--model {config.model} is a {head or model_config.model_type}, which says no task: give --task, one of "
        f"{', '.join(TASKS)}"
    )


def classes_of(model_config: PreTrainedConfig | None) -> tuple[str, ...]:
    """The classes of a classifier by number; none where the model is no classifier."""
    if model_config is None or not _classifies(model_config):
        return ()
    names: dict[int, str] = model_config.id2label or {}
    return tuple(names[n] for n in sorted(names))


def load_model(
    config: FinetuningConfig,
    task: str,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Sequence[str] = (),
    known_classes: Sequence[str] = (),
) -> PreTrainedModel:
    """The model in float32, with its tokenizer set to its languages and given a padding token.

    Args:
        config: names the model.
        task: which head it gets.
        model_config: the model's; the head's classes and `config.dropout` are written into it.
        tokenizer: the model's.
        classes: of a classifier; a head for as many is kept, one for another number is made anew.
        known_classes: those that its head was trained for.

    Raises:
        UserError: the folder lacks a part, a language is missing or unknown, or a setting cannot be made.
    """
    assert config.model is not None
    classifies = task == CLASSIFICATION
    if classifies:
        model_config.num_labels = len(classes)
        model_config.id2label = dict(enumerate(classes))
        model_config.label2id = {name: n for n, name in enumerate(classes)}
        model_config.problem_type = "single_label_classification"
    if config.dropout is not None:
        _set_dropout(config, model_config)
    model, new = load_weights(
        config.model, _LOADERS[task], tokenizer, new_head=classifies, dtype=torch.float32,
        config=model_config, ignore_mismatched_sizes=classifies,
    )  # fmt: skip
    if new:
        logger.info(f"{len(new)} weights are new: {', '.join(new)}")
    elif classifies and tuple(known_classes) != tuple(classes):
        logger.info(f"the trained head's classes {', '.join(known_classes)} are {', '.join(classes)} from here on")
    if task == SEQ2SEQ:
        use_languages(model, tokenizer, (config.source_code, config.target_code), "--source_code and --target_code")
        _check_decoder_start(config, model)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"--model {config.model}: its tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # classifiers look for a row's last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def with_lora(config: FinetuningConfig, task: str, model: PreTrainedModel) -> Any:
    """The model with LoRA matrices (Hu et al. 2022) in its linear layers, the only weights that are trained.

    Raises:
        UserError: peft is not installed, or finds no layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora_r needs peft: pip install peft") from error
    kinds = {SEQ2SEQ: "SEQ_2_SEQ_LM", CAUSAL: "CAUSAL_LM", CLASSIFICATION: "SEQ_CLS"}
    assert config.lora_r is not None
    fault = f"--lora_r: no LoRA matrices can be put into --model {config.model}"
    with explaining(fault), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it for GPT-2's layers, and says so
        matrices = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            task_type=kinds[task],
        )
        return get_peft_model(model, matrices)


def _set_dropout(config: FinetuningConfig, model_config: PreTrainedConfig) -> None:
    """Set every dropout that a configuration names, its parts' (an encoder's, a decoder's) too."""
    named = []
    for part in (model_config, *(x for x in vars(model_config).values() if isinstance(x, PreTrainedConfig))):
        for name, value in vars(part).items():
            if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float):
                setattr(part, name, config.dropout)
                named.append(name)
    if not named:
        raise UserError(
            f"--dropout: the {model_config.model_type} of --model {config.model} has none to set; --lora_r has a "
            "dropout of its own, and --ba_m 1 needs none"
        )
    logger.info(f"dropout {config.dropout}: {', '.join(dict.fromkeys(named))}")


def _check_decoder_start(config: FinetuningConfig, model: PreTrainedModel) -> None:
    """Make a decoder's inputs of a target, as training will, and look for the token that a search begins with."""
    fault = (
        f"--model {config.model} has no token that a decoder begins with; set decoder_start_token_id in its config.json"
    )
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    with explaining(fault):
        if shift is not None:
            shift(labels=torch.tensor([[5, 6]]))
    settings = model.generation_config
    if settings is not None and settings.decoder_start_token_id is None and settings.bos_token_id is None:
        raise UserError(fault)


def _check_kind(config: FinetuningConfig, model_config: PreTrainedConfig) -> None:
    if config.task == SEQ2SEQ and not model_config.is_encoder_decoder:
        raise UserError(f"--task {SEQ2SEQ} needs an encoder-decoder, and --model {config.model} is none")
    if config.task == CAUSAL and model_config.is_encoder_decoder:
        raise UserError(f"--task {CAUSAL} needs a decoder alone, and --model {config.model} is an encoder-decoder")
    if config.task == CAUSAL and _is_encoder(model_config):
        raise UserError(
            f"--task {CAUSAL} needs a model that sees the past alone, and --model {config.model} is an encoder "
            f"({model_config.model_type}), which would see the token it predicts"
        )


def _classifies(model_config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in model_config.architectures or ())


def _is_encoder(model_config: PreTrainedConfig) -> bool:
    """Encoders have a causal head in transformers too, for those that are made decoders of."""
    return type(model_config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model_config, "is_decoder", False)


def collator_for(task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Pads a batch; labels that are tokens with -100, and with the decoder's inputs where there is a decoder."""
    if task == CLASSIFICATION:
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model if task == SEQ2SEQ else None)
