"""Sentence pairs as token ids: encoded once into a memory-mapped Arrow file, read and padded a batch at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import MarianTokenizer

from seqba.loss import IGNORE_INDEX
from tasks.cli.cache import fill_cache
from tasks.text.encoding import LineEncoder
from tasks.text.parallel import DROP_REASONS, DataError, ParallelText, describe_dropped, fingerprint
from tasks.text.tokenizer import load_tokenizer, tokenizer_fingerprint

_CHUNK = 10_000  # pairs encoded at once: a record batch of the file
_LAYOUT = 3  # of the folder; raise it and cached folders are made anew
_SHORT = 10  # pieces of the longer side of a short pair
_SHORT_RATIO = 9.0  # and the ratio that its sides may have
_ID_LIST = pa.list_(pa.int32())
_SCHEMA = pa.schema({"input_ids": _ID_LIST, "labels": _ID_LIST, "length": pa.int32()})


@dataclass(frozen=True)
class LengthLimit:
    """Which pairs are dropped for their lengths, in ids with eos.

    Those with a side over `max_length`, and those whose sides (their pieces, eos aside) are over `max_ratio` apart,
    longer / shorter; of short pairs, with at most 10 pieces on the longer side, only those over 9 apart, since a word
    or two more is no sign of a bad translation there.
    """

    max_length: int | None = None
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise DataError(f"max_length must be at least 2, a piece and eos, got {self.max_length}")
        if self.max_ratio is not None and not self.max_ratio >= 1:
            raise DataError(f"max_ratio must be at least 1, got {self.max_ratio}")

    def broken_by(self, source: int, target: int) -> str | None:
        """Why a pair of these lengths is dropped, one of `DROP_REASONS`; None where it is kept."""
        longer, shorter = max(source, target) - 1, min(source, target) - 1  # pieces
        if not shorter:
            return "empty"
        if self.max_length is not None and longer >= self.max_length:
            return "too_long"
        if self.max_ratio is None:
            return None
        limit = max(_SHORT_RATIO, self.max_ratio) if longer <= _SHORT else self.max_ratio
        return "length_ratio" if longer > limit * shorter else None


def encode_pairs(
    text: ParallelText,
    tokenizer: MarianTokenizer | str | Path,
    *,
    cache_dir: str | Path,
    num_proc: int = 1,
    max_length: int | None = None,
    max_ratio: float | None = None,
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Encode every pair, or find them in the cache, as a data set that stays on disk.

    The file is keyed by the text's and tokenizer's content and the limit, and appears in one rename. Pairs keep their
    order; those over a limit (`LengthLimit`) or with a side that has no piece are dropped. SentencePiece's own threads,
    `num_proc` of them, encode.

    Returns:
        The data set: `input_ids` and `labels` (unpadded, eos included) and `length`, the longer side's ids.
        And how many pairs were dropped, by `DROP_REASONS`.

    Raises:
        DataError: no pair is left.
    """
    if num_proc < 1:
        raise DataError(f"num_proc must be at least 1, got {num_proc}")
    limit = LengthLimit(max_length, max_ratio)
    if not isinstance(tokenizer, MarianTokenizer):
        tokenizer = load_tokenizer(tokenizer)
    folder = Path(cache_dir) / f"pairs-{_cache_key(text, tokenizer, limit)}"

    def fill(unfinished: Path) -> None:
        counts = _write_pairs(unfinished / "pairs.arrow", text, tokenizer, limit, num_proc)
        (unfinished / "counts.json").write_text(json.dumps(counts))

    fill_cache(folder, fill)
    counts = json.loads((folder / "counts.json").read_text())
    return datasets.Dataset.from_file(str(folder / "pairs.arrow")), counts


def lengths(dataset: datasets.Dataset, column: str = "length") -> NDArray[np.int32]:
    """The `length` column, the longer side of each pair in ids; or how many ids the rows of another column have."""
    found = dataset.select_columns(column).with_format("arrow")[:][column]
    return (found if column == "length" else pc.list_value_length(found)).to_numpy()


@dataclass(frozen=True)
class TranslationCollator:
    """Pad B samples to tensors, as `DataCollatorForSeq2Seq(tokenizer, model=model)` would.

    `input_ids`, `attention_mask` (B, S); `labels` (B, T), padded with -100; `decoder_input_ids` (B, T), the labels
    shifted right behind `decoder_start_token_id`. Other fields of a sample are left behind.

    >>> collate = TranslationCollator(pad_token_id=0, decoder_start_token_id=0)
    >>> batch = collate([{"input_ids": [5, 1], "labels": [8, 9, 1]}, {"input_ids": [6, 7, 1], "labels": [4, 1]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 1, 0], [6, 7, 1]], [[8, 9, 1], [4, 1, -100]])
    >>> batch["decoder_input_ids"].tolist()
    [[0, 8, 9], [0, 4, 1]]
    """

    pad_token_id: int
    decoder_start_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Pad a batch; the samples hold lists of ids."""
        input_ids, attended = self._pad([sample["input_ids"] for sample in samples], self.pad_token_id)
        labels, counted = self._pad([sample["labels"] for sample in samples], IGNORE_INDEX)
        decoder_input_ids = np.full_like(labels, self.decoder_start_token_id)
        decoder_input_ids[:, 1:] = np.where(counted, labels, self.pad_token_id)[:, :-1]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attended.astype(np.int64),
            "labels": labels,
            "decoder_input_ids": decoder_input_ids,
        }
        return {name: torch.from_numpy(x) for name, x in batch.items()}

    def _pad(self, rows: Sequence[Sequence[int]], fill: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows as a matrix, and where it holds theirs."""
        row_lengths = np.array([len(row) for row in rows])
        is_real = np.arange(row_lengths.max()) < row_lengths[:, None]
        padded = np.full(is_real.shape, fill, dtype=np.int64)
        padded[is_real] = np.fromiter(chain.from_iterable(rows), np.int64)
        return padded, is_real


def _cache_key(text: ParallelText, tokenizer: MarianTokenizer, limit: LengthLimit) -> str:
    decides = [_LAYOUT, fingerprint(text), tokenizer_fingerprint(tokenizer), asdict(limit)]
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def _write_pairs(
    path: Path, text: ParallelText, tokenizer: MarianTokenizer, limit: LengthLimit, num_proc: int
) -> dict[str, int]:
    counts = dict.fromkeys(DROP_REASONS, 0)
    num_kept = 0
    sides = [(side, LineEncoder(tokenizer, is_target=n == 1)) for n, side in enumerate((text.source, text.target))]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for start in range(0, len(text), _CHUNK):
            rows = []
            encoded = [encode(side[start : start + _CHUNK], num_proc) for side, encode in sides]
            for source, target in zip(*encoded, strict=True):
                reason = limit.broken_by(len(source), len(target))
                if reason:
                    counts[reason] += 1
                else:
                    rows.append((source, target, max(len(source), len(target))))
            columns = zip(*rows, strict=True) if rows else ([], [], [])
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            num_kept += len(rows)
    if not num_kept:
        raise DataError(f"no pair is left of {len(text)}: {describe_dropped(counts)}")
    return counts
