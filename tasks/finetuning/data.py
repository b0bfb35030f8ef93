"""From a data set to token ids: which columns, which splits, and what was cut or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from tasks.cli.errors import DataError
from tasks.finetuning.config import CAUSAL, CLASSIFICATION, SEQ2SEQ, FinetuningConfig
from tasks.finetuning.generated import generate_data
from tasks.text.data_sets import load_data_set, without_cache_files

TRAIN, VALID, TEST = "train", "validation", "test"
_NAMES = {VALID: ("validation", "valid", "val", "dev"), TEST: ("test",)}
_MAX_HELD_OUT = 2_000
_MAX_CLASSES = 10_000
_TRANSLATION = "translation"  # a column of dictionaries from language to sentence, as `wmt/wmt16` has


@dataclass(frozen=True)
class Splits:
    """The raw splits of a data set with the columns of a task: `source` and `target`, `text`, or `text` and `label`.

    Attributes:
        train, valid: each with a sample at least.
        test: None where there is none.
        classes: names of the classes, by label; empty where the task has none.
    """

    train: Dataset
    valid: Dataset
    test: Dataset | None
    classes: tuple[str, ...] = ()


def load_splits(
    config: FinetuningConfig, task: str, seed: int, say: Callable[[str], None], *, known_classes: Sequence[str] = ()
) -> Splits:
    """Read the data set, choose its columns and splits, and say what was chosen.

    Args:
        config: names the data set and its columns.
        task: of the model.
        seed: of a held-out part.
        say: prints.
        known_classes: the model's classes by number: where the data set has the same ones, they keep their numbers.

    Raises:
        DataError: it cannot be loaded, lacks a split, a column or a language, or a column cannot be used.
    """
    if config.dataset is None:
        say(f"no data named: training on the built-in generated text ({task})")
        data = generate_data(task)
    else:
        data = load_data_set(config.dataset, config.dataset_config)
    if TRAIN not in data:
        raise DataError(f"{config.dataset} has the splits {', '.join(data)}; training needs {TRAIN!r}")
    named = {split: next((name for name in names if name in data), None) for split, names in _NAMES.items()}
    splits = {TRAIN: data[TRAIN], **{split: data[name] for split, name in named.items() if name}}
    columns = _columns(config, task, splits[TRAIN])
    with without_cache_files():
        splits = {split: _select(split, rows, columns) for split, rows in splits.items()}
        classes: tuple[str, ...] = ()
        if task == CLASSIFICATION:
            splits, classes = _with_labels(splits, columns["label"], say)
            splits, classes = _numbered_as(known_classes, splits, classes)
        for split, rows in splits.items():
            if not len(rows):
                raise DataError(f"the {split} split of {config.dataset} is empty")
        if VALID not in splits:
            splits = _hold_out(splits, config.valid_share, seed, say)
    return Splits(splits[TRAIN], splits[VALID], splits.get(TEST), classes)


def encode(
    rows: Dataset, task: str, tokenizer: PreTrainedTokenizerBase, max_length: int, source_prefix: str = ""
) -> tuple[Dataset, Counter[str]]:
    """Token ids of every row, with its labels, without padding.

    A causal text ends with the end-of-sequence token, unless it was cut.

    Args:
        rows: of `Splits`.
        task: what the labels are: the target's ids, the text's own, or the class.
        tokenizer: the model's.
        max_length: most tokens of a side.
        source_prefix: put before every source.

    Returns:
        The encoded rows, and how many were `cut`, or dropped as `blank` (nothing but space on a side) or as `short`
        (a causal text of one token).
    """
    counts: Counter[str] = Counter()
    text_columns = [name for name in rows.column_names if name != "label"]

    def cut(encoded: dict[str, list], again: Callable[[], dict[str, list]]) -> tuple[dict[str, list], list[bool]]:
        too_long = [len(ids) > max_length for ids in encoded["input_ids"]]
        return (again() if any(too_long) else encoded), too_long

    def tokenized(*texts: Sequence[str], as_target: bool = False) -> tuple[dict[str, list], list[bool]]:
        names = ("text_target",) if as_target else ("text", "text_pair")[: len(texts)]
        named = {name: list(text) for name, text in zip(names, texts, strict=True)}
        more = {"return_attention_mask": False, "return_token_type_ids": len(texts) > 1, "verbose": False}
        return cut(
            dict(tokenizer(**named, **more)),
            lambda: dict(tokenizer(**named, **more, truncation=True, max_length=max_length)),
        )

    def encoded(batch: dict[str, list]) -> dict[str, list]:
        keep = [n for n, texts in enumerate(zip(*(batch[name] for name in text_columns), strict=True))
                if all(text is not None and text.strip() for text in texts)]  # fmt: skip
        counts["blank"] += len(batch[text_columns[0]]) - len(keep)
        kept = {name: [values[n] for n in keep] for name, values in batch.items()}
        if not keep:
            return {"input_ids": [], "labels": []}
        if task == SEQ2SEQ:
            sources, source_cut = tokenized([source_prefix + text for text in kept["source"]])
            targets, target_cut = tokenized(kept["target"], as_target=True)
            counts["cut"] += sum(map(any, zip(source_cut, target_cut, strict=True)))
            return {"input_ids": sources["input_ids"], "labels": targets["input_ids"]}
        texts, was_cut = tokenized(*(kept[name] for name in text_columns))
        counts["cut"] += sum(was_cut)
        if task == CAUSAL:
            ids = [_ended(row, tokenizer.eos_token_id, max_length) for row in texts["input_ids"]]
            ids = [row for row in ids if len(row) > 1]  # nothing would follow a single token
            counts["short"] += len(keep) - len(ids)
            return {"input_ids": ids, "labels": [list(row) for row in ids]}
        return {**texts, "labels": kept["label"]}

    with without_cache_files():
        return rows.map(encoded, batched=True, remove_columns=rows.column_names, desc="tokenizing"), counts


def _ended(ids: list[int], eos: int | None, max_length: int) -> list[int]:
    return ids if eos is None or ids[-1] == eos or len(ids) >= max_length else [*ids, eos]


# ---- columns


def _columns(config: FinetuningConfig, task: str, rows: Dataset) -> dict[str, str]:
    """Our name of every column -> the data set's own, `translation.LANG` for a language."""
    if task == SEQ2SEQ:
        return _sides(config, rows)
    strings = [name for name, feature in rows.features.items() if _is_string(feature) and name != config.label_column]
    columns = {"text": config.text_column or _only(strings, rows, "--text_column")}
    if task == CLASSIFICATION:
        if config.text_pair_column is not None:
            columns["text_pair"] = config.text_pair_column
        columns["label"] = config.label_column
    return columns


def _sides(config: FinetuningConfig, rows: Dataset) -> dict[str, str]:
    if config.source_column is not None and config.target_column is not None:
        return {"source": config.source_column, "target": config.target_column}
    if {"source", "target"} <= set(rows.column_names):
        return {"source": "source", "target": "target"}
    if _TRANSLATION not in rows.column_names:
        raise DataError(
            f"the data set has the columns {', '.join(rows.column_names)}: name the two sides by --source_column and "
            "--target_column"
        )
    feature = rows.features[_TRANSLATION]
    languages = list(getattr(feature, "languages", None) or feature)
    chosen = {"source": config.source_lang, "target": config.target_lang}
    for side, language in chosen.items():
        if language not in languages:
            said = "is not given" if language is None else f"is {language!r}"
            raise DataError(f"the data set has the languages {', '.join(languages)}; --{side}_lang {said}")
    return {side: f"{_TRANSLATION}.{language}" for side, language in chosen.items()}


def _only(strings: list[str], rows: Dataset, option: str) -> str:
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise DataError(f"the data set has the columns {', '.join(rows.column_names)}: name the text by {option}")
    return strings[0]


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _select(split: str, rows: Dataset, columns: dict[str, str]) -> Dataset:
    """The columns of a task under our names, text checked for being text."""
    if lacking := [name for name in columns.values() if name not in rows.column_names]:
        rows = rows.flatten()  # languages become columns
    if lacking := [name for name in lacking if name not in rows.column_names]:
        raise DataError(f"the {split} split has no column {lacking[0]!r}; it has {', '.join(rows.column_names)}")
    taken = rows.select_columns(list(columns.values())).rename_columns(
        {theirs: ours for ours, theirs in columns.items() if theirs != ours}
    )
    for ours, theirs in columns.items():
        if ours != "label" and not _is_string(taken.features[ours]):
            raise DataError(f"the column {theirs!r} of the {split} split holds no text but {taken.features[ours]}")
    return taken


# ---- classes


def _with_labels(
    splits: dict[str, Dataset], column: str, say: Callable[[str], None]
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Labels as whole numbers from 0, and the names of the classes, by the training split."""
    splits = {split: _labelled(split, rows, say) for split, rows in splits.items()}
    if TEST in splits and not len(splits[TEST]):
        del splits[TEST]
    feature = splits[TRAIN].features["label"]
    if isinstance(feature, ClassLabel) and len(feature.names) > 1:
        return splits, tuple(feature.names)
    values = sorted(set(splits[TRAIN]["label"]))
    if any(isinstance(value, float) for value in values) or not 1 < len(values) <= _MAX_CLASSES:
        raise DataError(
            f"the column {column!r} has {len(values)} different values of {feature}, which are no classes; name "
            "another by --label_column"
        )
    numbers = {value: n for n, value in enumerate(values)}
    for split, rows in splits.items():
        if strange := set(rows["label"]) - set(values):
            raise DataError(f"the {split} split has the label {min(strange)!r}, which the train split has not")
    return _renumbered(splits, numbers), tuple(map(str, values))


def _numbered_as(
    known: Sequence[str], splits: dict[str, Dataset], classes: tuple[str, ...]
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """The same classes under the numbers that a trained head has for them; its names, where the data has numbers."""
    if classes == tuple(map(str, range(len(known)))):
        return splits, tuple(known)
    if sorted(known) != sorted(classes) or tuple(known) == classes:
        return splits, classes
    return _renumbered(splits, {n: known.index(name) for n, name in enumerate(classes)}), tuple(known)


def _renumbered(splits: dict[str, Dataset], numbers: dict[Any, int]) -> dict[str, Dataset]:
    return {
        split: rows.map(lambda row: {"label": numbers[row["label"]]}, features=_integers(rows))
        for split, rows in splits.items()
    }


def _labelled(split: str, rows: Dataset, say: Callable[[str], None]) -> Dataset:
    """Rows with a label: test splits whose answers are secret have -1, or nothing."""
    secret = {None, -1} if isinstance(rows.features["label"], ClassLabel) or split == TEST else {None}
    kept = rows.filter(lambda label: label not in secret, input_columns="label")
    if len(kept) < len(rows):
        say(f"{split} split: dropped {len(rows) - len(kept):,} of {len(rows):,} rows without a label")
    return kept


def _integers(rows: Dataset) -> Features:
    return Features({**rows.features, "label": Value("int64")})


def _hold_out(splits: dict[str, Dataset], share: float, seed: int, say: Callable[[str], None]) -> dict[str, Dataset]:
    rows = splits[TRAIN]
    held = min(_MAX_HELD_OUT, max(1, round(share * len(rows))))
    if held >= len(rows):
        raise DataError(f"the train split has {len(rows)} rows, of which none would be left beside a validation split")
    say(f"no validation split: {held:,} of the {len(rows):,} training rows are held out for it")
    parts = rows.train_test_split(test_size=held, seed=seed)
    return {**splits, TRAIN: parts["train"], VALID: parts["test"]}
