"""Translate test sets with one or several models, score them, and compare the models: the whole of `eval_bleu.py`."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.cli.errors import UserError, writing
from tasks.cli.files import write_text
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.decoding.mc_dropout import has_dropout
from tasks.decoding.search import count_truncated, describe_other_settings, translate
from tasks.models.names import short_names
from tasks.models.pretrained import load_translator, use_languages
from tasks.scoring.bleu import bleu_tokenizer, one_line_each, paired_bootstrap, score_all
from tasks.scoring.folder import REMEDY, keep_results, new_folder
from tasks.scoring.hypotheses import hypothesis_files
from tasks.text.parallel import OPENERS, DataError, ParallelText, read_lines
from tasks.translation.evaluation.config import EvaluationConfig
from tasks.translation.evaluation.table import format_bootstrap, format_scores
from tasks.translation.prepare import read_sources, unique_names


def evaluate(config: EvaluationConfig, machine: MachineOptions) -> dict[str, Any]:
    """Run `config`: everything that can be wrong is found before the first sentence is translated.

    Returns:
        What `results.json` holds: options, models, and by test set the scores of every model and their comparison.

    Raises:
        UserError: text, models, the device or the output folder cannot be used.
    """
    folder = new_folder(config.output_dir, prefix="hyp.")
    texts = _read_texts(config)
    accelerator = start_accelerator(machine, seed=config.seed)
    systems = _load_systems(config)
    pairs = list(product(systems, texts))
    files = dict(zip(pairs, hypothesis_files([f"{name}.{test}" for name, test in pairs]), strict=True))
    translated = {
        name: _translate_all(config, accelerator, name, *system, texts, folder, files)
        for name, system in systems.items()
    }
    if not accelerator.is_main_process:
        return {}
    results: dict[str, Any] = {"options": {**asdict(config), **asdict(machine)}, "models": {}, "tests": {}}
    for name, path in short_names(config.model).items():
        results["models"][name] = about = {"model": path, "decoding": _describe_search(config, systems[name][0])}
        accelerator.print(f"{name}: {about['model']}; {about['decoding']}")
    for test, text in texts.items():
        results["tests"][test] = scores = _score(
            config, {name: found[test] for name, found in translated.items()}, text
        )
        accelerator.print(f"\n{test}, {len(text):,} sentences\n{_report(scores)}")
    keep_results(accelerator, folder, results, kept="translations and scores", also=", hyp.*.txt")
    return results


def _read_texts(config: EvaluationConfig) -> dict[str, ParallelText]:
    """Every test set by its short name; no pair of them is ever dropped."""
    texts = {
        name: read_sources([prefix], config.source_lang, config.target_lang)
        for name, prefix in unique_names(config.test_prefix).items()
    }
    if config.source is not None and config.reference is not None:
        source, reference = read_lines(config.source), read_lines(config.reference)
        if len(source) != len(reference):
            raise DataError(
                f"the sides differ in length: {config.source} has {len(source)} lines, "
                f"{config.reference} has {len(reference)}"
            )
        name = Path(config.source).name
        for packed in filter(None, OPENERS):
            name = name.removesuffix(packed)
        texts[name if name not in texts else config.source] = ParallelText(source, reference)
    return texts


def _load_systems(config: EvaluationConfig) -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """All models, before one of them works for an hour."""
    systems = {name: load_translator(path) for name, path in short_names(config.model).items()}
    codes = (config.source_code, config.target_code)
    for model, tokenizer in systems.values():
        use_languages(model, tokenizer, codes, "--source_code and --target_code")
    for name, (model, _) in systems.items():
        if config.mc_dropout and not has_dropout(model):
            raise UserError(
                f"--mc-dropout {config.mc_dropout}: the model {name} drops nothing out (its dropout probabilities are "
                f"0), so {config.mc_dropout} masks would be {config.mc_dropout} times the same; leave the option out"
            )
    return systems


def _describe_search(config: EvaluationConfig, model: PreTrainedModel) -> str:
    other = describe_other_settings(model.generation_config)
    return str(config.decoding) + (f"; the model's own {other}" if other else "")


def _translate_all(
    config: EvaluationConfig,
    accelerator: Accelerator,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, ParallelText],
    folder: Path | None,
    files: dict[tuple[str, str], str],
) -> dict[str, dict[str, Any]]:
    """One model's translations of every test set, each written as soon as it is there."""
    model.to(accelerator.device)
    found = {}
    for test, text in texts.items():
        sources = [config.source_prefix + source for source in text.source]
        truncated = count_truncated(model, tokenizer, sources)
        cut = f", {truncated} cut to what the model takes" if truncated else ""
        accelerator.print(f"{name} translates {test}: {len(text):,} sentences{cut}")
        start = time.perf_counter()
        translations = translate(
            accelerator, model, tokenizer, sources, decoding=config.decoding, max_tokens=config.max_tokens
        )
        seconds = time.perf_counter() - start
        lines, joined = one_line_each(translations)
        file = files[name, test]
        if folder is not None and accelerator.is_main_process:
            with writing(folder / file, remedy=REMEDY):
                write_text(folder / file, "".join(f"{line}\n" for line in lines))
        found[test] = {
            "lines": lines, "truncated": truncated, "line_ends_replaced": joined, "seconds": seconds, "file": file
        }  # fmt: skip
    model.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _score(config: EvaluationConfig, found: dict[str, dict[str, Any]], text: ParallelText) -> dict[str, Any]:
    lines = {name: one.pop("lines") for name, one in found.items()}
    if config.output_dir is None:
        for one in found.values():
            del one["file"]
    tokenizer = bleu_tokenizer(config.target_lang, config.bleu_tokenize)
    systems = {
        name: one
        | {"scores": [asdict(score) for score in score_all(lines[name], text.target, config.target_lang, tokenizer)]}
        for name, one in found.items()
    }
    test: dict[str, Any] = {"sentences": len(text), "systems": systems}
    if len(lines) > 1:
        compared = paired_bootstrap(
            lines, text.target, num_samples=config.num_samples_bootstrap, seed=config.seed, tokenizer=tokenizer
        )
        test["paired_bootstrap"] = [asdict(score) for score in compared]
    return test


def _report(test: dict[str, Any]) -> str:
    table = format_scores(test["systems"])
    return f"{table}\n{format_bootstrap(test['paired_bootstrap'])}" if "paired_bootstrap" in test else table
