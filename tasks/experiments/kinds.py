"""What an experiment has to know of each task: its script, and the names of the options that the protocol sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tasks.language_modelling.config as language_modelling
import tasks.language_modelling.evaluation.config as language_modelling_evaluation
import tasks.translation.config as translation
import tasks.translation.evaluation.config as translation_evaluation
import tasks.vision.config as vision
import tasks.vision.evaluation.config as vision_evaluation
from tasks.finetuning.config import parse_finetuning
from tasks.finetuning.resume import LAST

SCRIPTS = Path(__file__).parents[2] / "scripts"


@dataclass(frozen=True)
class Kind:
    """A task as the protocol sees it.

    Attributes:
        script: the training script.
        parse: a command line -> all options by name; a UserError where the task refuses one.
        batch: the option that says how large a batch is before repetition.
        rate: the option that the learning rate is proportional to.
        epochs: options that count in epochs; `epochs` itself ends a run.
        logged: the file of a run folder that grows with every logged update, and what stands in it once for each.
        evaluation: the evaluation script and the parser of its options, where there is one.
        data: options that name the data, in both scripts.
    """

    script: str
    parse: Callable[[Sequence[str]], Mapping[str, Any]]
    batch: str
    rate: str = "learning_rate"
    updates: str = "max_updates"
    accumulation: str = "accumulation"
    epochs: tuple[str, ...] = ()
    resume: tuple[str, ...] = ("--resume",)
    log_every: str = "log_every"
    logged: tuple[str, str] = ("metrics.jsonl", '"update"')
    evaluation: tuple[str, Callable[[Sequence[str]], Any]] | None = None
    data: tuple[str, ...] = ("data",)


def _finetuning(argv: Sequence[str]) -> dict[str, Any]:
    config, ba_args, args = parse_finetuning(argv)
    return {**vars(args), **asdict(config), **asdict(ba_args)}


KINDS: dict[str, Kind] = {
    "translation": Kind(
        "train_wmt.py",
        lambda argv: translation.parse_config(argv).as_json(),
        batch="max_tokens",
        rate="lr_scale",
        evaluation=("eval_bleu.py", translation_evaluation.parse_evaluation),
        data=("test_prefix", "source_lang", "target_lang", "bleu_tokenize"),
    ),
    "language_modelling": Kind(
        "train_ptb.py",
        lambda argv: language_modelling.parse_config(argv).as_json(),
        batch="batch_size",
        evaluation=("eval_ppl.py", language_modelling_evaluation.parse_evaluation),
    ),
    "vision": Kind(
        "train_vision.py",
        lambda argv: vision.parse_config(argv).as_json(),
        batch="batch_size",
        epochs=("epochs", "lr_drops", "warmup_epochs", "weight_decay_epochs"),
        evaluation=("eval_vision.py", vision_evaluation.parse_evaluation),
        data=("data", "corpus_seed", "valid_images"),
    ),
    "finetuning": Kind(
        "finetune.py",
        _finetuning,
        batch="per_device_train_batch_size",
        updates="max_steps",
        accumulation="gradient_accumulation_steps",
        resume=("--resume_from_checkpoint", LAST),
        log_every="logging_steps",
        logged=("log.txt", "'loss'"),
    ),
}
