"""Train a transformers model on a data set with the Trainer, M copies of every sample in an update, top to bottom."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from seqba.audit import IdenticalCopiesError
from seqba.trainer import BatchAugmentationArguments, BatchAugmentationTrainer
from tasks.errors import UserError, identical_copies, make_folder
from tasks.finetuning.config import SEQ2SEQ, FinetuningConfig, as_json
from tasks.finetuning.data import Splits, encode, load_splits
from tasks.finetuning.metric import metrics_for
from tasks.finetuning.model import collator_for, load_model, task_of
from tasks.machine import use_all_cores
from tasks.metrics import write_json, write_text
from tasks.pretrained import load_config_and_tokenizer
from tasks.translation.decode import Decoding, max_source_length, translate
from tasks.translation.metric import one_line_each, score_bleu

RESULTS = "results.json"


def finetune(
    config: FinetuningConfig, ba_args: BatchAugmentationArguments, args: TrainingArguments
) -> BatchAugmentationTrainer:
    """Load, train, evaluate, and leave the model with its tokenizer and `results.json` in the run folder.

    Raises:
        UserError: options, model, data or the run folder cannot be used; nothing has been trained then.
    """
    folder = Path(args.output_dir)
    _check_folder(folder, args)
    set_seed(args.seed)

    def say(text: str) -> None:
        if args.process_index == 0:
            print(text, flush=True)

    # ---- data and model
    task = task_of(config, load_config_and_tokenizer(config.model)[0] if config.model else None)
    splits = load_splits(config, task, args.seed, say)
    model, tokenizer = load_model(config, task, splits.classes, args.seed, say)
    max_length = min(config.max_length, max_source_length(model, tokenizer) or config.max_length)
    encoded: dict[str, Dataset] = {}
    for name, rows in _named(splits).items():
        encoded[name], counts = encode(rows, task, tokenizer, max_length, config.source_prefix)
        say(f"{name}: {len(encoded[name]):,} samples; {_describe(counts, max_length)}")
        if not len(encoded[name]):
            raise UserError(f"the {name} split has no sample that is not blank")

    # ---- training
    preprocess_logits, compute_metrics = metrics_for(task)
    trainer = BatchAugmentationTrainer(
        model=model,
        args=args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=collator_for(task, model, tokenizer),
        processing_class=tokenizer,
        preprocess_logits_for_metrics=preprocess_logits,
        compute_metrics=compute_metrics,
        ba_args=ba_args,
    )
    threads = use_all_cores(trainer.accelerator)
    say(
        f"{model.num_parameters():,} parameters, M = {ba_args.ba_m}, {args.world_size} process(es), {threads} threads "
        f"on {args.device}"
    )
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except IdenticalCopiesError as error:
        raise identical_copies(error, "a model whose config.json has a dropout above 0") from error

    # ---- results
    trainer.save_model()
    results: dict[str, Any] = {"task": task, "options": as_json(config, ba_args, args)}
    results["validation"] = trainer.evaluate()
    if splits.test is not None:
        results["test"] = trainer.evaluate(encoded["test"], metric_key_prefix="test")
        if task == SEQ2SEQ:
            results["test"] |= _translate(config, trainer, tokenizer, splits.test)
    results["counters"] = trainer.counters.state()["args"]
    if trainer.is_world_process_zero():
        write_json(folder / RESULTS, results)
    for name in ("validation", "test"):
        say(f"{name}: {_summary(results[name])}" if name in results else f"no {name} split: nothing was tested")
    say(f"{folder}: the model, {RESULTS}{', hyp.test.txt' if 'test_bleu' in results.get('test', {}) else ''}")
    return trainer


def _check_folder(folder: Path, args: TrainingArguments) -> None:
    """A folder with a model or a checkpoint is a run, which only resuming may go on with."""
    make_folder(folder, remedy="name another folder with --output_dir")
    held = [path.name for path in folder.iterdir() if path.name in (RESULTS, "config.json")]
    held += [path.name for path in folder.glob("checkpoint-*")]
    if held and args.resume_from_checkpoint is None:
        raise UserError(
            f"{folder} already holds a run ({min(held)}): go on with it by --resume_from_checkpoint last, name another "
            "folder with --output_dir, or remove it first"
        )
    if (
        args.resume_from_checkpoint is not None
        and not Path(args.resume_from_checkpoint, "trainer_state.json").is_file()
    ):
        raise UserError(f"--resume_from_checkpoint {args.resume_from_checkpoint} is no checkpoint of a Trainer")


def _named(splits: Splits) -> dict[str, Dataset]:
    named = {"train": splits.train, "validation": splits.valid, "test": splits.test}
    return {name: rows for name, rows in named.items() if rows is not None}


def _describe(counts: Counter[str], max_length: int) -> str:
    said = [f"dropped {counts['blank']:,} blank ones"] if counts["blank"] else ["dropped none"]
    if counts["cut"]:
        said.append(f"cut {counts['cut']:,} to {max_length:,} tokens")
    return ", ".join(said)


def _translate(
    config: FinetuningConfig, trainer: BatchAugmentationTrainer, tokenizer: PreTrainedTokenizerBase, test: Dataset
) -> dict[str, Any]:
    """The test split by beam search, each row once; its BLEU with what makes it comparable."""
    decoding = Decoding(config.num_beams, config.length_penalty)
    sources = [config.source_prefix + (text or "") for text in test["source"]]
    references = [text or "" for text in test["target"]]
    model = trainer.accelerator.unwrap_model(trainer.model)
    found, _ = one_line_each(translate(trainer.accelerator, model, tokenizer, sources, decoding=decoding))
    score = score_bleu(found, references, str(decoding))
    if trainer.is_world_process_zero():
        write_text(Path(trainer.args.output_dir, "hyp.test.txt"), "".join(f"{line}\n" for line in found))
    return {"test_bleu": score.bleu, "test_bleu_signature": score.signature, "test_bleu_decoding": score.decoding}


def _summary(metrics: dict[str, Any]) -> str:
    """The figures without the Trainer's own loss and timings."""
    kept = {name.partition("_")[2]: value for name, value in metrics.items()}
    names = ("accuracy", "nats_per_token", "perplexity", "bleu", "bleu_signature", "bleu_decoding")
    return ", ".join(
        f"{name} {kept[name]:.4g}" if isinstance(kept[name], float) else str(kept[name])
        for name in names
        if name in kept
    )
