"""What a run leaves beside its model: the learning curve, and the model's card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seqba.arguments import BatchAugmentationArguments
from seqba.trainer import BatchAugmentationTrainer
from tasks.cli.files import write_text
from tasks.cli.software import describe_machine
from tasks.finetuning.config import CAUSAL, CLASSIFICATION, METRICS, SEQ2SEQ, FinetuningConfig
from tasks.models.folder import write_card
from tasks.run.log import draw_curve
from tasks.run.progress import Figures

CURVE = "curve.png"
_LOADERS = {
    SEQ2SEQ: ("text2text-generation", "AutoModelForSeq2SeqLM"),
    CAUSAL: ("text-generation", "AutoModelForCausalLM"),
    CLASSIFICATION: ("text-classification", "AutoModelForSequenceClassification"),
}
_USAGE = """
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{{folder}}")
tokenizer = AutoTokenizer.from_pretrained("{{folder}}")
"""


def describe_run(
    trainer: BatchAugmentationTrainer,
    task: str,
    config: FinetuningConfig,
    ba_args: BatchAugmentationArguments,
    results: dict[str, Any],
) -> None:
    """Write `curve.png`, `metrics.jsonl` and the card into the run folder; `results` are those of `results.json`."""
    folder = Path(trainer.args.output_dir)
    metric = METRICS[task][-1]
    is_accuracy = task == CLASSIFICATION
    figures = Figures(
        target="sample",
        loss="loss" if is_accuracy else "nats per token",
        training="training",
        metric="valid_accuracy" if is_accuracy else "valid_loss",
        higher_is_better=is_accuracy,
    )
    names = {"step": "update", "loss": "loss", f"eval_{metric}": figures.metric}
    rows = [{ours: row[theirs] for theirs, ours in names.items() if theirs in row} for row in trainer.state.log_history]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    draw_curve(rows, folder / CURVE, title=folder.name, figures=figures)

    args = trainer.args
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
    made_by = {
        "base model": config.model or "none: learnt from nothing",
        "data": config.dataset or "generated",
        "updates": f"{trainer.state.global_step:,}" + (f", the weights of {Path(best).name}" if best else ""),
        "copies of each sample in an update, M": f"{ba_args.ba_m} (reproducible copies {ba_args.reproducible_copies})",
        "batch": f"{samples:,} samples a rank before repetition",
        **({} if config.dropout is None else {"dropout": f"{config.dropout}"}),
        **({} if config.lora_r is None else {"LoRA": f"rank {config.lora_r}, dropout {config.lora_dropout}, merged"}),
        **describe_machine(trainer.accelerator),
    }
    pipeline, loader = _LOADERS[task]
    scores = [
        f"{split}: {name.partition('_')[2]} {value if isinstance(value, str) else format(value, '.4g')}"
        for split in ("validation", "test")
        for name, value in results.get(split, {}).items()
        if not name.endswith(("runtime", "_per_second")) and isinstance(value, (str, float))
    ]
    base = "A model" if config.model is None else Path(config.model).name
    write_card(
        folder,
        title=f"{base}, {task}",
        languages=(),
        library="transformers",
        pipeline=pipeline,
        made_by=made_by,
        scores=scores,
        usage=_USAGE.format(loader=loader),
    )
