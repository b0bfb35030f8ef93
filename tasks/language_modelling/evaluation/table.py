"""Figures and comparisons as text tables, with what each counts below them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.scoring.bootstrap import Difference
from tasks.scoring.table import align


def format_text(counts: Mapping[str, Any]) -> str:
    """The number of each unit in the text."""
    return (
        f"{counts['called']}: {counts['lines']:,} lines; {counts['bytes']:,} bytes of UTF-8, a line end counted as "
        f"one; {counts['words']:,} words between white space, each line end counted as one more"
    )


def format_figures(models: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a model, and below what the numbers are of, by model where that differs.

    Args:
        models: name -> its entry in `results.json`.
    """
    rows = [["model", "tokens", "nats/token", "perplexity", "bits/byte", "word perplexity", "seconds"]]
    notes = [
        "nats/token and perplexity are of the model's own tokens, line ends counted: compare them between models of "
        "one vocabulary",
        "bits/byte and word perplexity are of the text's bytes and words, line ends counted: they compare any models",
    ]
    for name, one in models.items():
        rows.append(
            [name, f"{one['tokens']:,}", f"{one['nats_per_token']:.4f}", f"{one['perplexity']:.2f}",
             f"{one['bits_per_byte']:.4f}", f"{one['word_perplexity']:.2f}", f"{one['seconds']:.1f}"]
        )  # fmt: skip
        notes.append(
            f"{name}: read {one['reading']}; line ends are {one['line_end']}; {one['unknown']:,} unknown tokens"
        )
        if one["unknown"]:
            notes.append(
                f"{name}: {one['unknown']:,} tokens stand for words outside of its vocabulary, of which only that they "
                "are unknown is scored: its bits/byte and word perplexity are too low to compare"
            )
        if one["dropped"]:
            notes.append(f"{name}: {one['dropped']:,} characters beside white space are in no token of its tokenizer")
    return "\n".join([align(rows), *notes])


def format_bootstrap(baseline: str, differences: Sequence[Difference], num_samples: int, seed: int) -> str:
    """A row a model: bits per byte, and how they differ from the first's."""
    rows = [["model", "bits/byte", f"minus {baseline}'s", "95 % from", "to", "p"]]
    for one in differences:
        rows.append(
            [one.model, f"{one.value:.4f}", *(f"{x:+.4f}" for x in (one.difference, one.low, one.high)),
             f"{one.p_value:.4f}"]
        )  # fmt: skip
    return f"{align(rows)}\npaired bootstrap over lines (Koehn 2004), {num_samples:,} resamples, seed {seed}"
