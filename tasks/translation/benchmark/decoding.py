"""Translating a test set: batches of like length, against `generate` in the order of the file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tasks.benchmark.ratios import Row, compare
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.decoding.search import Decoding, max_new_tokens, translate
from tasks.translation.benchmark.config import TranslationBenchmark
from tasks.translation.train import load_corpus, train

_BATCH = 32
_TRAINED_UPDATES = 300  # so many teach a small model to end its sentences


def decoding(config: TranslationBenchmark) -> list[Row]:
    """Beam-4 translation of many sentences against `generate` in file order, 32 at a time."""
    accelerator = start_accelerator(MachineOptions(config.mixed_precision, config.cpu), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = config.model or _train(config, folder)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSeq2SeqLM.from_pretrained(path).eval().to(accelerator.device)
    tests = load_corpus(config.training().config, accelerator).tests
    sources = [source for text in tests.values() for source in text.source][: config.sentences]
    ratio = compare(
        lambda: _in_file_order(accelerator, model, tokenizer, sources),
        lambda: translate(accelerator, model, tokenizer, sources, decoding=Decoding()),
        pairs=max(2, config.pairs // 2),
        warm_up=0,
    )
    name = f"beam-4 decoding, sentences/s over `generate` in file order with batch 32, {len(sources):,} sentences"
    rate = f"{len(sources) / ratio.seconds_b:,.1f} sentences/s, {ratio.seconds_b:.1f} s in all"
    described = f"model {config.model}" if config.model else f"a model of {_TRAINED_UPDATES} updates"
    return [Row(name, f"{ratio.median:.2f}", "at least 1.5", f"{ratio}; {rate}; {described}")]


@torch.inference_mode()
def _in_file_order(
    accelerator: Accelerator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]
) -> list[str]:
    translations: list[str] = []
    for start in range(0, len(sources), _BATCH):
        batch = tokenizer(list(sources[start : start + _BATCH]), return_tensors="pt", padding=True, truncation=True)
        limit = max_new_tokens(model, batch.input_ids.shape[1])  # `translate`'s own, of the longest here
        settings = {"num_beams": 4, "length_penalty": 0.6, "max_length": None, "max_new_tokens": limit}
        with accelerator.autocast():
            output = model.generate(**batch.to(accelerator.device), **settings)
        translations += tokenizer.batch_decode(output, skip_special_tokens=True)
    return translations


def _train(config: TranslationBenchmark, folder: str) -> Path:
    cadence = dict.fromkeys(("max_updates", "eval_every", "save_every"), _TRAINED_UPDATES)
    rate = {"lr_decay": "inverse-sqrt", "warmup_updates": _TRAINED_UPDATES // 2}
    train(config.training(output_dir=f"{folder}/run", test_prefix=[], **rate, **cadence))
    return Path(folder, "run", "model")
