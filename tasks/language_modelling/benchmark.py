"""The cost of language modelling, as ratios of speed and of memory: the rows of `benchmark.py language-modelling`.

Memory is measured in processes of their own: python -m tasks.language_modelling.benchmark PLAN.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from seqba.carried import CarriedState
from seqba.loss import linear_cross_entropy
from seqba.step import TrainStep
from tasks.benchmark.memory import compare_peaks, measure_peak
from tasks.benchmark.options import BenchmarkOptions
from tasks.benchmark.ratios import Row, compare, wait_for_device
from tasks.benchmark.updates import OwnUpdates, fused_over_single, share_waiting
from tasks.cli.files import write_text
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.cli.options import option
from tasks.language_modelling.averaging import NonMonotonicASGD
from tasks.language_modelling.config import LanguageModelOptions, parse_config
from tasks.language_modelling.loss import CarriedLoss, LanguageModelLoss, count_labels
from tasks.language_modelling.model import AwdLstmConfig, AwdLstmForCausalLM
from tasks.language_modelling.prepare import load_corpus
from tasks.language_modelling.train import make_stream, training
from tasks.run.stream import SAMPLE_IDS

ROWS = ("bare", "fused", "scopes", "waiting", "memory")
_NEVER = 1_000_000_000
_LINES = 10_000  # of the training text
_WORDS = 20  # of a line


@dataclass(frozen=True)
class LanguageModelBenchmark(BenchmarkOptions):
    """Options of the benchmark: it times updates of a preset on random words."""

    preset: str = option("awd-lstm-ptb", "of scripts/train_ptb.py")
    vocab_size: int = option(10_000, "V, words of the text")
    rows: list[str] = option(list(ROWS), "what is measured", choices=ROWS)
    ba_m: int = option(10, "M of the rows about Batch Augmentation")
    updates: int = option(10, "updates in one timing")
    pairs: int = option(5, "timed pairs, A B A B; none for waiting and memory")

    def __post_init__(self) -> None:
        self.check(vocab_size=3)

    def training(self, **changes: Any) -> LanguageModelOptions:
        """The run whose updates are timed: it never validates or saves, and logs as the preset does."""
        return parse_config(["--preset", self.preset, "--data", str(self._text())]).changed(
            **{
                "mixed_precision": self.mixed_precision,
                "cpu": self.cpu,
                "max_updates": _NEVER,
                "eval_every": _NEVER,
                "save_every": _NEVER,
                **changes,
            }
        )

    def _text(self) -> Path:
        """A folder with a text of random words: nothing that is measured depends on which they are."""
        folder = Path(self.cache_dir, f"words-{self.vocab_size}")
        if not (folder / "train.txt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            draw = random.Random(0)
            words = [f"w{i}" for i in range(self.vocab_size - 1)]  # and <eos>
            drawn = words + draw.choices(words, k=_LINES * _WORDS)
            lines = [" ".join(drawn[i : i + _WORDS]) + "\n" for i in range(0, len(drawn), _WORDS)]
            for split, text in {"valid": lines[:1], "test": lines[:1], "train": lines}.items():
                write_text(folder / f"{split}.txt", "".join(text))
        return folder


class BareUpdates:
    """A plain PyTorch loop on the same windows, already on the device: a stack of `nn.LSTM` without any dropout."""

    def __init__(self, options: LanguageModelOptions, num_batches: int) -> None:
        self._accelerator = start_accelerator(options.machine, seed=options.run.seed)
        corpus = load_corpus(options.config.data)
        batches = make_stream(options, self._accelerator, corpus).take(num_batches)
        self._windows = itertools.cycle([{k: x for k, x in one.items() if k != SAMPLE_IDS} for one in batches])
        config = options.config
        widths = [*[config.hidden_size] * (config.num_layers - 1), config.embedding_size]
        self._embedding = nn.Embedding(len(corpus.tokenizer), config.embedding_size)
        self._bias = nn.Parameter(torch.zeros(len(corpus.tokenizer)))
        self._layers = [
            nn.LSTM(a, b, batch_first=True) for a, b in itertools.pairwise([config.embedding_size, *widths])
        ]
        self._states: list[Any] = [None] * len(widths)
        modules = nn.ModuleList([self._embedding, *self._layers]).to(self._accelerator.device)
        self._bias.data = self._bias.data.to(self._accelerator.device)
        self._parameters = [*modules.parameters(), self._bias]
        self._optimizer = torch.optim.SGD(self._parameters, lr=1e-3, weight_decay=config.weight_decay)
        self._max_norm = options.run.max_norm or float("inf")

    def advance(self, count: int) -> None:
        """Do `count` updates; the device has finished then."""
        for window in itertools.islice(self._windows, count):
            self._update(window)
        wait_for_device()

    def _update(self, window: dict[str, Tensor]) -> None:
        with self._accelerator.autocast():
            hidden = self._embedding(window["input_ids"])
            for i, layer in enumerate(self._layers):
                hidden, state = layer(hidden, self._states[i])
                self._states[i] = tuple(x.detach() for x in state)
            loss = linear_cross_entropy(hidden, self._embedding.weight, window["labels"], bias=self._bias)
        (loss / window["labels"].numel()).backward()
        nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def bare(config: LanguageModelBenchmark) -> list[Row]:
    """The training script with all its regularisers against a bare loop over a bare stack of the same shape."""
    own = OwnUpdates(training, config.training())
    loop = BareUpdates(config.training(), num_batches=(config.pairs + 1) * config.updates)
    ratio = compare(
        lambda: own.advance(config.updates), lambda: loop.advance(config.updates), pairs=config.pairs, warm_up=1
    )
    own.close()
    return [ratio.row("an update, M=1, over one of a bare nn.LSTM stack with tied softmax", "at most 1.08")]


def fused(config: LanguageModelBenchmark) -> list[Row]:
    """One fused update of M copies under shared masks against M updates of one."""
    changes = {"ba_m": config.ba_m, "copies_per_pass": config.ba_m, "mask_scope": "shared"}
    many = OwnUpdates(training, config.training(**changes))
    wanted = "at most 1.0 on CPU, 0.5 on a GPU"
    return fused_over_single(config, many, OwnUpdates(training, config.training()), wanted)


def scopes(config: LanguageModelBenchmark) -> list[Row]:
    """Masks of weights and of words for each copy against one for all, in the same fused updates."""
    each, one = (
        OwnUpdates(training, config.training(ba_m=config.ba_m, copies_per_pass=config.ba_m, mask_scope=scope))
        for scope in ("per_copy", "shared")
    )
    count = max(1, config.updates // config.ba_m)
    ratio = compare(lambda: each.advance(count), lambda: one.advance(count), pairs=config.pairs, warm_up=1)
    each.close()
    one.close()
    return [ratio.row(f"an update of fused M={config.ba_m}, masks per_copy over shared", "at most 1.2 on CPU")]


def waiting(config: LanguageModelBenchmark) -> list[Row]:
    """The share of an update in which the loop waits for its windows."""
    return share_waiting(config, [(1, OwnUpdates(training, config.training()))], "at most 1 %")


def memory(config: LanguageModelBenchmark) -> list[Row]:
    """Peak memory of eight copies one after another over one."""
    options = config.training().config
    sizes = {name: getattr(options, name) for name in ("embedding_size", "hidden_size", "num_layers", "batch_size")}
    one = Plan(
        1, vocab_size=config.vocab_size, length=options.bptt, mixed_precision=config.mixed_precision, cpu=config.cpu,
        **sizes,
    )  # fmt: skip
    name = "peak memory of M=8 with one copy a pass over M=1"
    return [compare_peaks(Plan.__module__, name, "at most 1.15", replace(one, num_copies=8), one)]


@dataclass(frozen=True)
class Plan:
    """An update of windows of random words, one copy a pass."""

    num_copies: int
    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    batch_size: int
    length: int
    mixed_precision: str = "no"
    cpu: bool = False


def update_of(plan: Plan) -> Callable[[], float]:
    """A function that does one update of the training step, and returns its loss when the device has finished."""
    accelerator: Accelerator = start_accelerator(MachineOptions(plan.mixed_precision, plan.cpu), seed=0)
    sizes = {name: getattr(plan, name) for name in ("vocab_size", "embedding_size", "hidden_size")}
    model = AwdLstmForCausalLM(AwdLstmConfig(num_hidden_layers=plan.num_layers, **sizes))
    loss_model = LanguageModelLoss(model, alpha=2.0, beta=1.0).train()
    wrapped, optimizer = accelerator.prepare(loss_model, NonMonotonicASGD(loss_model.parameters(), 1e-3))
    carried = CarriedState(model.model.initial_state)
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=CarriedLoss(carried),
        count_fn=count_labels,
        num_copies=plan.num_copies,
        copies_per_pass=1,
        max_norm=0.25,
        carried=[carried],
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(plan.vocab_size, (plan.batch_size, plan.length + 1), generator=generator)
    batch = {"input_ids": ids[:, :-1].to(accelerator.device), "labels": ids[:, 1:].to(accelerator.device)}
    return lambda: float(step([batch], update=1).loss)


MEASUREMENTS: dict[str, Callable[[LanguageModelBenchmark], list[Row]]] = {
    row.__name__: row for row in (bare, fused, scopes, waiting, memory)
}

if __name__ == "__main__":
    print(measure_peak(update_of, Plan(**json.loads(sys.argv[1]))))
