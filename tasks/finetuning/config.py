"""The options of `scripts/finetune.py`: the model, the data, Batch Augmentation, and all of transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from seqba.arguments import BatchAugmentationArguments
from tasks.cli.errors import UserError
from tasks.cli.options import OptionParser, check_choices, check_least, check_not_blank, flag, option
from tasks.scoring.bleu import bleu_tokenizer

SEQ2SEQ, CAUSAL, CLASSIFICATION = "seq2seq", "causal", "classification"
TASKS = (SEQ2SEQ, CAUSAL, CLASSIFICATION)

# Options that mean something to some tasks only.
_OF_TASKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("source_column", "target_column", "source_lang", "target_lang", "source_code", "target_code",
                     "source_prefix", "num_beams", "length_penalty", "bleu_tokenize"), (SEQ2SEQ,)),
    "text_column": (CAUSAL, CLASSIFICATION),
    **dict.fromkeys(("text_pair_column", "label_column"), (CLASSIFICATION,)),
}  # fmt: skip

# The figures of an evaluation by task, the chosen one last, and whether more of it is better.
METRICS: dict[str, tuple[str, ...]] = {
    SEQ2SEQ: ("perplexity", "nats_per_token"), CAUSAL: ("perplexity", "nats_per_token"), CLASSIFICATION: ("accuracy",)
}  # fmt: skip

# Options of transformers that this script sets itself, by the only value that it can use.
_SET_HERE: dict[str, Any] = {
    "do_predict": False, "label_names": None, "batch_eval_metrics": False, "eval_do_concat_batches": True,
    "prediction_loss_only": False,
}  # fmt: skip
_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1, "dataloader_num_workers": 0, "seed": 0, "data_seed": 0,
}  # fmt: skip

# What TrainingArguments' own defaults are replaced with where the model is made here, and learns from nothing.
_FROM_NOTHING: dict[str, Any] = {
    "learning_rate": 2e-3, "warmup_steps": 50, "max_steps": 400,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
    "logging_steps": 25, "eval_strategy": "steps", "eval_steps": 100, "save_steps": 200,
}  # fmt: skip


@dataclass(frozen=True)
class FinetuningConfig:
    """The model, the data and the decoding."""

    model: str | None = option(
        None,
        "model folder of transformers or hub id, with its tokenizer; its weights are trained in float32 "
        "(autocast by --bf16 true); by default a small new one",
        group="model",
    )
    dropout: float | None = option(
        None, "set all dropouts of the model to this probability (many have 0); by default as its config.json has them"
    )
    lora_r: int | None = option(
        None,
        "train LoRA matrices of this rank in all linear layers, and no other weights (needs peft)",
    )
    lora_alpha: int = option(16, "the LoRA matrices' product is scaled by this / --lora_r")
    lora_dropout: float = option(0.1, "probability of zeroing, on the input of the LoRA matrices")
    task: str | None = option(
        None, f"by default what the model's head is for, {SEQ2SEQ} for a new model", choices=TASKS
    )
    dataset: str | None = option(
        None,
        "data set: a folder of save_to_disk or of data files, or a hub id; by default a generated one",
        group="data",
    )
    dataset_config: str | None = option(None, "configuration of the data set, such as de-en of wmt/wmt16")
    source_column: str | None = option(None, f"column of the sources of {SEQ2SEQ}")
    target_column: str | None = option(None, f"column of the targets of {SEQ2SEQ}")
    source_lang: str | None = option(None, "language of the sources, of a column `translation` of dictionaries")
    target_lang: str | None = option(None, "language of the targets, of a column `translation` of dictionaries")
    source_code: str | None = option(
        None, "the tokenizer's code of the source language, of multilingual models such as mBART (en_XX)"
    )
    target_code: str | None = option(None, "the tokenizer's code of the target language (de_DE)")
    source_prefix: str = option("", 'text put before every source, such as T5\'s "translate English to German: "')
    text_column: str | None = option(
        None,
        f"column of the texts of {CAUSAL} and {CLASSIFICATION}; of {CAUSAL} also of chats, lists of messages with role "
        "and content, of which every token is a target",
    )
    text_pair_column: str | None = option(None, f"column of a second text beside it, of {CLASSIFICATION}")
    label_column: str = option("label", f"column of the classes of {CLASSIFICATION}")
    parse_special_tokens: bool = option(
        False,
        "read the special tokens that stand in texts (</s>, <|endoftext|>) as tokens; by default they are text",
    )
    max_length: int = option(512, "tokens of a text, or of a side; longer ones are cut, and counted")
    valid_share: float = option(0.05, "share of the training split that is held out where there is no validation split")
    cache_dir: str = option("runs/cache", "folder for the vocabulary of a new model")
    num_beams: int = option(4, f"beam width of the translations of the test split, of {SEQ2SEQ}", group="decoding")
    length_penalty: float = option(0.6, "finished beams are ranked by log-probability / length^this")
    bleu_tokenize: str | None = option(None, "tokeniser of sacreBLEU (13a, char, zh ...); by default by the language")

    def __post_init__(self) -> None:
        check_choices(self)
        check_not_blank(self, "model", "dataset")
        if self.max_length < 2:
            raise UserError(f"--max_length must be at least 2, got {self.max_length}")
        check_least(self, {"num_beams": 1, "lora_r": 1, "lora_alpha": 1})
        for name in ("dropout", "lora_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UserError(f"{flag(name)} is a probability, from 0 to below 1, got {getattr(self, name)}")
        if self.model is None and (self.dropout is not None or self.lora_r is not None):
            raise UserError("--dropout and --lora_r need --model: a model that is made here has its own dropout")
        if not abs(self.length_penalty) < float("inf"):
            raise UserError(f"--length_penalty must be finite, got {self.length_penalty}")
        bleu_tokenizer(self.target_lang or self.target_code, self.bleu_tokenize)
        if not 0 < self.valid_share < 1:
            raise UserError(f"--valid_share must be above 0 and below 1, got {self.valid_share}")
        if self.model is None and self.dataset is not None:
            raise UserError("--dataset needs --model: a model that is made here knows the generated text alone")
        if (self.source_column is None) != (self.target_column is None):
            raise UserError("--source_column and --target_column name the two sides: give both, or neither")
        if self.source_column is not None and self.source_column == self.target_column:
            raise UserError(f"--source_column and --target_column are both {self.source_column}")

    def check_task(self, task: str) -> None:
        """Refuse options that `task` would not look at by a UserError that names the tasks they are of."""
        for named in fields(self):
            tasks = _OF_TASKS.get(named.name, TASKS)
            if task not in tasks and getattr(self, named.name) != named.default:
                raise UserError(
                    f"--{named.name} is an option of {' and '.join(tasks)}, and the task is {task}: leave it out, or "
                    "name another --task"
                )


def parse_finetuning(
    argv: Sequence[str] | None = None,
) -> tuple[FinetuningConfig, BatchAugmentationArguments, TrainingArguments]:
    """Options from the command line; those of `TrainingArguments` are all there, under their own names.

    Raises:
        UserError: an option is unknown or out of range; the message names it.
    """
    parser = OptionParser(
        (FinetuningConfig, BatchAugmentationArguments, TrainingArguments),
        allow_abbrev=False,
        description="Train a transformers model on a data set, with Batch Augmentation. Without --output_dir the run "
        "folder is runs/finetune-MODEL-DATASET-mM-seedS.",
        epilog="Without --model the defaults are those of a model that learns from nothing, with --model those of "
        "TrainingArguments.",
    )
    from_nothing = OptionParser.peek(argv, "model") is None
    max_steps = parser.get_default("max_steps")
    parser.set_defaults(
        output_dir=None,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,
        use_cpu=not torch.accelerator.is_available(),  # else --bf16 is refused there
        **(_FROM_NOTHING if from_nothing else {}),
    )
    named = parser.parse_known_options(argv)
    parser.set_defaults(output_dir=default_folder(named.model, named.dataset, named.task, named.ba_m, named.seed))
    if from_nothing and named.num_train_epochs != parser.get_default("num_train_epochs"):
        parser.set_defaults(max_steps=max_steps)
    if named.do_eval and not named.do_train:
        raise UserError("this script always trains and then evaluates; leave --do_train and --do_eval out")
    for name, value in _SET_HERE.items():
        if getattr(named, name, value) != value:
            raise UserError(f"--{name} cannot be used: this script sets it by the task; leave it out")
    check_least(named, _LEAST)
    if named.max_steps <= 0 and not named.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs must be above 0 without --max_steps, got {named.num_train_epochs}")
    if not 0 <= named.label_smoothing_factor < 1:
        raise UserError(f"--label_smoothing_factor must be from 0 to below 1, got {named.label_smoothing_factor}")
    if (named.metric_for_best_model or "").removeprefix("eval_") in ("perplexity", "nats_per_token"):
        parser.set_defaults(greater_is_better=False)  # transformers takes every figure but a loss for one to raise
    config, ba_args, args = parser.parse_args_into_dataclasses(argv)
    if args.fp16 and args.device.type == "cpu":  # accelerate would quietly train in fp32
        raise UserError("--fp16 needs an accelerator, and this run is on cpu; take --bf16 true or neither")
    return config, ba_args, args


def check_best_metric(args: TrainingArguments, task: str) -> None:
    """Refuse a figure to choose the best checkpoint by which this task does not measure.

    Raises:
        UserError: it names those that it does.
    """
    known = ("loss", *METRICS[task])
    if args.metric_for_best_model is not None and args.metric_for_best_model.removeprefix("eval_") not in known:
        raise UserError(
            f"--metric_for_best_model must be one of {', '.join(known)} for {task}, got {args.metric_for_best_model}"
        )


def default_folder(model: str | None, dataset: str | None, task: str | None, num_copies: int, seed: int) -> str:
    """The run folder where none is named.

    >>> default_folder("models/t5-small", "data/xsum/", None, 4, 0)
    'runs/finetune-t5-small-xsum-m4-seed0'
    """
    what = [name.rstrip("/").rsplit("/", 1)[-1] for name in (model, dataset) if name] or ["generated", task or SEQ2SEQ]
    return f"runs/finetune-{'-'.join(what)}-m{num_copies}-seed{seed}"


def as_json(config: FinetuningConfig, ba_args: BatchAugmentationArguments, args: TrainingArguments) -> dict[str, Any]:
    """All options, for `results.json`; of transformers' own those that are not what they are by default."""
    changed = {
        option.name: getattr(args, option.name)
        for option in fields(args)
        if option.init and option.default is not MISSING and getattr(args, option.name) != option.default
    }
    return {**asdict(config), **asdict(ba_args), "training": {name: as_plain(value) for name, value in changed.items()}}


def as_plain(value: Any) -> Any:
    """As JSON can hold it: transformers' enumerations by their values."""
    return value if isinstance(value, (int, float, list, dict, type(None))) else str(getattr(value, "value", value))
