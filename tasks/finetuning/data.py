"""From a data set to the splits and columns of a task, checked."""

from __future__ import annotations

import logging
import re
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, Features, Value

from tasks.cli.errors import DataError
from tasks.finetuning.config import CAUSAL, CLASSIFICATION, SEQ2SEQ, FinetuningConfig
from tasks.finetuning.generated import generate_data
from tasks.text.data_sets import is_chat, load_data_set, without_cache_files

logger = logging.getLogger(__name__)

TRAIN, VALID, TEST = "train", "validation", "test"
_NAMES = {VALID: ("validation", "valid", "val", "dev"), TEST: ("test",)}
_MAX_HELD_OUT = 2_000
_MAX_CLASSES = 10_000
Splits: TypeAlias = dict[str, Dataset]
_TRANSLATION = "translation"  # a column of dictionaries from language to sentence, as `wmt/wmt16` has


def load_splits(
    config: FinetuningConfig, task: str, seed: int, *, known_classes: tuple[str, ...] = ()
) -> tuple[Splits, tuple[str, ...]]:
    """Read the data set, choose its columns and splits, and log what was chosen.

    `seed` is that of a held-out part. `known_classes` are the model's by number: where the data has them, they keep it.

    Returns:
        The splits "train", "validation" and, where there is one, "test", none of them empty, with the columns of the
        task: `source` and `target`, `text`, or `text` (`text_pair`) and `label`; and the names of the classes by label,
        none where the task has none.

    Raises:
        DataError: it cannot be loaded, lacks a split, a column or a language, or a column cannot be used.
    """
    if config.dataset is None:
        logger.info(f"no data named: training on the built-in generated text ({task})")
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
            splits, classes = _with_classes(splits, columns["label"], known_classes)
        for split, rows in splits.items():
            if not len(rows):
                raise DataError(f"the {split} split of {config.dataset} is empty")
        if VALID not in splits:
            splits = _hold_out(splits, config.valid_share, seed)
    return {split: splits[split] for split in (TRAIN, VALID, TEST) if split in splits}, classes


def _columns(config: FinetuningConfig, task: str, rows: Dataset) -> dict[str, str]:
    """Our name of every column -> the data set's own, `translation.LANG` for a language."""
    if len(rows.column_names) == 1 and (found := re.search(r"[;\t|]", rows.column_names[0])):
        raise DataError(
            f"the data set has one column, {rows.column_names[0]!r}: is it a CSV whose separator is {found[0]!r}? "
            "Only commas part the columns of a CSV here; write it with commas, or as JSON lines or Parquet"
        )
    if task == SEQ2SEQ:
        return _sides(config, rows)
    strings = [name for name, feature in rows.features.items() if _is_string(feature) and name != config.label_column]
    if task == CAUSAL and not strings:
        strings = [name for name, feature in rows.features.items() if is_chat(feature)]
    if config.text_column is None and "text" not in strings and len(strings) != 1:
        raise DataError(f"the data set has the columns {', '.join(rows.column_names)}: name the text by --text_column")
    columns = {"text": config.text_column or ("text" if "text" in strings else strings[0])}
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
        feature = taken.features[ours]
        if ours != "label" and not (_is_string(feature) or (ours == "text" and is_chat(feature))):
            raise DataError(f"the column {theirs!r} of the {split} split holds no text but {feature}")
    return taken


# ---- classes


def _with_classes(splits: Splits, column: str, known: tuple[str, ...]) -> tuple[Splits, tuple[str, ...]]:
    """Labels as whole numbers from 0, and the names of the classes by number.

    The numbers are a `ClassLabel`'s, or the places of the training split's values in order; for the same classes as a
    trained head's they are the head's. Numbers without names take those of the head. (`class_encode_column` would put
    10 before 2 and number each split by itself, `align_labels_with_mapping` take classes of another case for the same.)
    """
    splits = {split: _labelled(split, rows, column) for split, rows in splits.items()}
    if TEST in splits and not len(splits[TEST]):
        del splits[TEST]
    feature = splits[TRAIN].features["label"]
    is_encoded = isinstance(feature, ClassLabel) and feature.num_classes > 1
    values = range(feature.num_classes) if is_encoded else _values(splits, column)
    names = tuple(feature.names) if is_encoded else tuple(map(str, values))
    order = known if sorted(known) == sorted(names) else names
    if not is_encoded or order != names:
        place = {name: n for n, name in enumerate(order)}
        numbers = {value: place[name] for value, name in zip(values, names, strict=True)}
        for split, rows in splits.items():
            features = Features({**rows.features, "label": Value("int64")})
            splits[split] = rows.map(lambda x: {"label": numbers[x]}, input_columns="label", features=features)
    return splits, known if names == tuple(map(str, range(len(known)))) else order


def _values(splits: Splits, column: str) -> list[Any]:
    """The labels of the training split in order; no other split may have others."""
    values = sorted(set(splits[TRAIN]["label"]))
    if any(isinstance(value, float) for value in values) or not 1 < len(values) <= _MAX_CLASSES:
        raise DataError(
            f"the column {column!r} has {len(values)} different values of {splits[TRAIN].features['label']}, which are "
            "no classes; name another by --label_column"
        )
    for split, rows in splits.items():
        if strange := set(rows["label"]) - set(values):
            raise DataError(f"the {split} split has the label {min(strange)!r}, which the train split has not")
    return values


def _labelled(split: str, rows: Dataset, column: str) -> Dataset:
    """Rows with a label: blank cells are none, and test splits whose answers are secret have -1, or nothing."""
    feature = rows.features["label"]
    if not isinstance(feature, (Value, ClassLabel)):
        raise DataError(
            f"the column {column!r} of the {split} split holds {feature}, and a text has one class here: a number or a "
            "name; name another by --label_column"
        )
    secret = {None, -1} if isinstance(feature, ClassLabel) or split == TEST else {None}
    kept = rows.filter(lambda label: label not in secret and str(label).strip() != "", input_columns="label")
    if str(feature.dtype).startswith("float") and all(float(label).is_integer() for label in kept["label"]):
        kept = kept.cast_column("label", Value("int64"))  # a blank cell of a CSV makes floats of whole numbers
    if len(kept) < len(rows):
        logger.info(f"{split} split: dropped {len(rows) - len(kept):,} of {len(rows):,} rows without a label")
    return kept


def _hold_out(splits: Splits, share: float, seed: int) -> Splits:
    rows = splits[TRAIN]
    held = min(_MAX_HELD_OUT, max(1, round(share * len(rows))))
    if held >= len(rows):
        raise DataError(f"the train split has {len(rows)} rows, of which none would be left beside a validation split")
    logger.info(f"no validation split: {held:,} of the {len(rows):,} training rows are held out for it")
    parts = rows.train_test_split(test_size=held, seed=seed)
    return {**splits, TRAIN: parts["train"], VALID: parts["test"]}
