"""Train a transformers model on a data set with the Trainer, M copies of every sample in an update, top to bottom."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from seqba.audit import IdenticalCopiesError
from seqba.checkpoint.files import follow_umask
from seqba.errors import StreamError, UnsupportedError
from seqba.trainer import BatchAugmentationArguments, BatchAugmentationTrainer
from tasks.cli.errors import UserError, identical_copies, writing
from tasks.cli.files import write_json, write_text
from tasks.cli.log import show_log
from tasks.cli.machine import use_threads
from tasks.decoding.search import Decoding, max_source_length, translate
from tasks.finetuning.callbacks import StopAtNonFinite, StopAtSignal, check_weights
from tasks.finetuning.config import SEQ2SEQ, FinetuningConfig, as_json, check_best_metric
from tasks.finetuning.data import TEST, TRAIN, VALID, Splits, load_splits
from tasks.finetuning.encoding import encode
from tasks.finetuning.generated import generate_model
from tasks.finetuning.metric import metrics_for
from tasks.finetuning.model import classes_of, collator_for, load_model, task_of, with_lora
from tasks.finetuning.report import CURVE, describe_run
from tasks.finetuning.resume import RESULTS, check_same_options, keep_options, prepare_folder
from tasks.models.pretrained import explaining, load_config_and_tokenizer
from tasks.run.guards import INTERRUPTED, stop_signals
from tasks.scoring.bleu import bleu_tokenizer, one_line_each, score_bleu

logger = logging.getLogger(__name__)

_HYPOTHESES = "hyp.test.txt"
_ADAPTER = "adapter"
_DROPPED = {"blank": "without text", "short": "of one token"}


def finetune(
    config: FinetuningConfig, ba_args: BatchAugmentationArguments, args: TrainingArguments
) -> BatchAugmentationTrainer:
    """Load, train, evaluate, and leave the model with its tokenizer and `results.json` in the run folder.

    Raises:
        UserError: options, model, data or the run folder cannot be used, which shows before or on the first update; or
            a loss that is not finite ends the run, whose earlier checkpoints are kept.
    """
    show_log(args.process_index == 0)
    checkpoint = prepare_folder(args)
    if checkpoint is not None:
        check_same_options(checkpoint, config, ba_args, args)
    set_seed(args.seed)

    # ---- data and model
    task, model, tokenizer, splits = _load(config, args)
    encoded = _encode(config, task, model, tokenizer, splits)
    if getattr(model, "generation_config", None) is not None:  # saved with the model at the end
        with explaining(f"--model {config.model}: its generation_config.json is not valid, and could not be saved"):
            model.generation_config.validate(strict=True)
    if config.lora_r is not None:
        model = with_lora(config, task, model)

    # ---- training
    try:
        trainer = BatchAugmentationTrainer(
            model=model,
            args=args,
            train_dataset=encoded[TRAIN],
            eval_dataset=encoded[VALID],
            data_collator=collator_for(task, model, tokenizer),
            processing_class=tokenizer,
            callbacks=[StopAtNonFinite()],
            ba_args=ba_args,
            **metrics_for(task),
        )
    except (ValueError, RuntimeError, ImportError) as error:  # options that do not go together, a missing tracker
        raise UserError(str(error)) from error
    threads = use_threads(trainer.accelerator)
    logger.info(
        f"{model.num_parameters(only_trainable=True):,} parameters to train, M = {ba_args.ba_m}, {args.world_size} "
        f"process(es), {threads} threads on {args.device}"
    )
    if trainer.is_world_process_zero():
        keep_options(config, ba_args, args)
    with stop_signals() as received:
        stop = StopAtSignal(received)
        trainer.add_callback(stop)
        _train(trainer, checkpoint)
    if stop.stopped:
        logger.info(f"stopped after update {trainer.state.global_step}; --resume_from_checkpoint last continues it")
        raise SystemExit(INTERRUPTED)

    # ---- results
    check_weights(trainer)
    if config.lora_r is not None:
        _merge_lora(trainer)
    trainer.save_model()
    if trainer.is_world_process_zero():
        follow_umask(*Path(args.output_dir).rglob("*.safetensors"))
    sentences = splits.get(TEST) if task == SEQ2SEQ else None
    results: dict[str, Any] = {"task": task, "options": as_json(config, ba_args, args)}
    results |= _evaluate(config, trainer, encoded.get(TEST), sentences)
    results["counters"] = trainer.counters.state()["args"]
    seconds = [row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row]
    results |= {"updates": trainer.state.global_step, "seconds": sum(seconds)}  # of a resumed run the last part's
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir, RESULTS), results)
        describe_run(trainer, task, config, ba_args, results)
    files = ["the model with its card", RESULTS, CURVE, *([] if sentences is None else [_HYPOTHESES])]
    logger.info(f"{args.output_dir}: {', '.join(files)}")
    return trainer


def _train(trainer: BatchAugmentationTrainer, checkpoint: str | None) -> None:
    remedy = "make room, then --resume_from_checkpoint last goes on from the newest checkpoint"
    try:
        with writing(str(trainer.args.output_dir), remedy=remedy):
            trainer.train(resume_from_checkpoint=checkpoint)
    except IdenticalCopiesError as error:
        raise identical_copies(error, "--dropout above 0, --lora_r with its dropout") from error
    except (UnsupportedError, StreamError) as error:
        raise UserError(str(error)) from error
    if not trainer.state.global_step:
        raise UserError(
            f"no update was done: {len(trainer.train_dataset):,} training samples do not fill a batch; lower "
            "--per_device_train_batch_size, or leave --dataloader_drop_last out"
        )


def _merge_lora(trainer: BatchAugmentationTrainer) -> None:
    """Save the LoRA matrices by themselves, and put their products into the weights: the model that is scored."""
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        adapted.save_pretrained(Path(trainer.args.output_dir, _ADAPTER))
    trainer.model = trainer.model_wrapped = adapted.merge_and_unload()


def _load(
    config: FinetuningConfig, args: TrainingArguments
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase, Splits]:
    """The task, its model and tokenizer, and the data, each checked against the others."""
    model_config, tokenizer = (None, None) if config.model is None else load_config_and_tokenizer(config.model)
    task = task_of(config, model_config)
    config.check_task(task)
    check_best_metric(args, task)
    known = classes_of(model_config)
    splits, classes = load_splits(config, task, args.seed, known_classes=known)
    if tokenizer is None or model_config is None:
        return task, *generate_model(task, config.cache_dir, args.seed), splits
    model = load_model(config, task, model_config, tokenizer, classes=classes, known_classes=known)
    return task, model, tokenizer, splits


def _encode(
    config: FinetuningConfig, task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, splits: Splits
) -> Splits:
    max_length = min(config.max_length, max_source_length(model, tokenizer) or config.max_length)
    encoded = {}
    for name, rows in splits.items():
        encoded[name], counts = encode(
            rows, task, tokenizer, max_length, config.source_prefix, parse_special_tokens=config.parse_special_tokens
        )
        logger.info(f"{name}: {len(encoded[name]):,} samples; {_describe(counts, max_length)}")
        if not len(encoded[name]):
            raise UserError(f"the {name} split has no sample with a target: all are blank or too short")
    return encoded


def _describe(counts: Counter[str], max_length: int) -> str:
    dropped = [f"{counts[why]:,} {said}" for why, said in _DROPPED.items() if counts[why]]
    said = [f"dropped {' and '.join(dropped)}" if dropped else "dropped none"]
    if counts["cut"]:
        said.append(f"cut {counts['cut']:,} to {max_length:,} tokens")
    if counts["marked"]:
        said.append(f"{counts['marked']:,} hold special tokens, read as text (--parse_special_tokens true: as tokens)")
    return ", ".join(said)


def _evaluate(
    config: FinetuningConfig, trainer: BatchAugmentationTrainer, test: Dataset | None, sentences: Dataset | None
) -> dict[str, dict[str, Any]]:
    """The scores of the validation split, and of the test split, with its `sentences` where they are translated."""
    scores = {"validation": _scores(trainer.evaluate())}
    if test is not None:
        scores["test"] = _scores(trainer.evaluate(test, metric_key_prefix="test"))
    if sentences is not None:
        scores["test"] |= _translate(config, trainer, sentences)
    for name in ("validation", "test"):
        logger.info(f"{name}: {_summary(scores[name])}" if name in scores else f"no {name} split: nothing was tested")
    return scores


def _translate(config: FinetuningConfig, trainer: BatchAugmentationTrainer, test: Dataset) -> dict[str, Any]:
    """The test split by beam search, each row once; its BLEU with what makes it comparable."""
    decoding = Decoding(config.num_beams, config.length_penalty)
    sources = [config.source_prefix + (text or "") for text in test["source"]]
    references = [text or "" for text in test["target"]]
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    found, _ = one_line_each(translate(trainer.accelerator, model, tokenizer, sources, decoding=decoding))
    tokenizer_of_bleu = bleu_tokenizer(config.target_lang or config.target_code, config.bleu_tokenize)
    score = score_bleu(found, references, str(decoding), tokenizer_of_bleu)
    if trainer.is_world_process_zero():
        write_text(Path(trainer.args.output_dir, _HYPOTHESES), "".join(f"{line}\n" for line in found))
    return {"test_bleu": score.bleu, "test_bleu_signature": score.signature, "test_bleu_decoding": score.decoding}


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without the Trainer's own loss, which is no mean over the targets for every model and number of ranks."""
    return {name: value for name, value in metrics.items() if not name.endswith("_loss")}


def _summary(metrics: dict[str, Any]) -> str:
    """The figures without the timings."""
    kept = {name.partition("_")[2]: value for name, value in metrics.items()}
    names = ("accuracy", "nats_per_token", "perplexity", "bleu", "bleu_signature", "bleu_decoding")
    return ", ".join(
        f"{name} {kept[name]:.4g}" if isinstance(kept[name], float) else str(kept[name])
        for name in names
        if name in kept
    )
