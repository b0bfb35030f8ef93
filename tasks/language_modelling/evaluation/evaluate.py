"""Score a text by one or several causal models and compare them: the whole of `eval_ppl.py`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.cli.options import flag
from tasks.language_modelling.evaluation.config import PerplexityConfig
from tasks.language_modelling.evaluation.model import CausalModel, load_causal
from tasks.language_modelling.evaluation.scoring import score_tokens
from tasks.language_modelling.evaluation.table import format_bootstrap, format_figures, format_text
from tasks.language_modelling.evaluation.text import Text, read_text
from tasks.language_modelling.evaluation.tokens import Tokens, encode
from tasks.language_modelling.evaluation.windows import Windows, carried_windows, overlapping_windows
from tasks.models.names import short_names
from tasks.scoring.bootstrap import paired_bootstrap
from tasks.scoring.folder import keep_results, new_folder

_CARRIED = 4_096  # tokens of a call that carries a state
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Scorer:
    """A model with the text in its tokens, and how it reads them."""

    model: CausalModel
    tokens: Tokens
    windows: Windows
    batch_size: int
    reading: str  # for the reader of the results


def evaluate(config: PerplexityConfig, machine: MachineOptions) -> dict[str, Any]:
    """Run `config`: everything that can be wrong is found before the first token is scored.

    Returns:
        What `results.json` holds: options, counts of the text, and by model its figures; and their comparison.

    Raises:
        UserError: text, models, windows, the device or the output folder cannot be used.
    """
    folder = new_folder(config.output_dir)
    assert config.data is not None
    text = read_text(config.data, config.split)
    accelerator = start_accelerator(machine, seed=config.seed)
    scorers = {name: _load(config, name, path, text) for name, path in short_names(config.model).items()}
    if all(scorer.model.is_recurrent for scorer in scorers.values()):
        for name in ("stride", "batch_size"):
            if getattr(config, name) is not None:
                raise UserError(
                    f"{flag(name)} {getattr(config, name)}: the model carries a state through the text, "
                    "read once from its beginning to its end; leave the option out"
                )
    line_bytes = text.line_bytes
    counts = {
        "called": text.called,
        "lines": len(text.lines),
        "bytes": int(line_bytes.sum()),
        "words": text.num_words,
        "line_ends_counted": True,
    }
    accelerator.print(format_text(counts))
    results: dict[str, Any] = {"options": {**asdict(config), **asdict(machine)}, "text": counts, "models": {}}
    line_bits = {}
    for name, path in short_names(config.model).items():
        nats, seconds = _score(config, accelerator, name, scorers[name])
        tokens = scorers[name].tokens
        line_bits[name] = np.bincount(tokens.lines, nats, minlength=len(text.lines)) / math.log(2)
        results["models"][name] = {
            "model": path, **_figures(nats, counts), "line_end": tokens.line_end, "unknown": tokens.unknown,
            "dropped": tokens.dropped, "reading": scorers[name].reading, "seconds": seconds,
        }  # fmt: skip
    accelerator.print(f"\n{format_figures(results['models'])}")
    if len(line_bits) > 1:
        compared = paired_bootstrap(line_bits, line_bytes, num_samples=config.resamples, seed=config.seed)
        results["paired_bootstrap"] = [asdict(difference) for difference in compared]
        accelerator.print(f"\n{format_bootstrap(next(iter(line_bits)), compared, config.resamples, config.seed)}")
    keep_results(accelerator, folder, results)
    return results


def _load(config: PerplexityConfig, name: str, path: str, text: Text) -> Scorer:
    model, tokenizer = load_causal(path, name)
    if config.mc_dropout and not model.is_random():
        raise UserError(
            f"--mc-dropout {config.mc_dropout}: the model {name} drops nothing out (its dropout probabilities are 0), "
            f"so {config.mc_dropout} masks would be {config.mc_dropout} times the same; leave the option out"
        )
    limit = model.max_positions
    length = config.max_length or (min(limit or _CARRIED, _CARRIED) if model.is_recurrent else limit)
    if length is None:
        raise UserError(
            f"--model {name} names no number of positions; give --max-length, the tokens that it reads at once"
        )
    if limit is not None and length > limit:
        raise UserError(f"--max-length {length} is more than the {limit} positions of the model {name}")
    stride = config.stride or length
    if stride > length:
        raise UserError(
            f"--stride {stride} is more than the {length} tokens that the model {name} reads at once: those between "
            "two windows would not be scored"
        )
    tokens = encode(text, tokenizer, config.line_end)
    masks = f"; {config.mc_dropout} dropout masks, drawn anew in each window" if config.mc_dropout else ""
    if model.is_recurrent:
        reading = f"in one stream, its state carried; windows of {length:,} tokens{masks}"
        return Scorer(model, tokens, carried_windows(len(tokens.ids), length), 1, reading)
    reading = f"in windows of {length:,} tokens, stride {stride:,}{masks}"
    windows = overlapping_windows(len(tokens.ids), length, stride)
    return Scorer(model, tokens, windows, config.batch_size or _BATCH_SIZE, reading)


def _score(
    config: PerplexityConfig, accelerator: Accelerator, name: str, scorer: Scorer
) -> tuple[npt.NDArray[np.float64], float]:
    """Nats of each token, and seconds; the masks are the same whichever models are scored beside it."""
    accelerator.print(f"{name} scores {len(scorer.tokens.ids):,} tokens")
    model = scorer.model.model
    model.to(accelerator.device)
    set_seed(config.seed, device_specific=True)
    start = time.perf_counter()
    nats = score_tokens(
        accelerator,
        scorer.model,
        scorer.tokens,
        scorer.windows,
        batch_size=scorer.batch_size,
        num_masks=config.mc_dropout,
    )
    seconds = time.perf_counter() - start
    model.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if bad := np.count_nonzero(~np.isfinite(nats)):
        raise UserError(
            f"--model {name}: the probabilities of {bad:,} of {len(nats):,} tokens are 0 or no number at all, so it "
            "has no perplexity; its weights are damaged, or --mixed-precision is too coarse for it"
        )
    return nats, seconds


def _figures(nats: npt.NDArray[np.float64], counts: dict[str, Any]) -> dict[str, float]:
    """Figures of the whole text: per token, and per unit of the text, which every tokenizer shares."""
    total = float(nats.sum())
    return {
        "tokens": len(nats),
        "nats": total,
        "nats_per_token": total / len(nats),
        "perplexity": _exp(total / len(nats)),
        "bits_per_byte": total / math.log(2) / counts["bytes"],
        "word_perplexity": _exp(total / counts["words"]),
    }


def _exp(mean: float) -> float:
    return math.exp(min(mean, 700))  # below the largest number
