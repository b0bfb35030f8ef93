"""Sentence pairs as token ids: encoded once into a memory-mapped Arrow file, read and padded a batch at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import MarianTokenizer

from seqba.loss import IGNORE_INDEX
from tasks.text.encoding import LineEncoder, Ragged
from tasks.text.parallel import DROP_REASONS, DataError, ParallelText, describe_dropped, fingerprint
from tasks.text.tokenizer import atomic_folder, load_tokenizer, tokenizer_fingerprint

Sample: TypeAlias = Mapping[str, Sequence[int] | NDArray[np.int32]]

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

    def is_uneven(self, source: NDArray[np.int32], target: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which pairs of these lengths break `max_ratio`."""
        if self.max_ratio is None:
            return np.zeros(len(source), dtype=np.bool_)
        longer, shorter = np.maximum(source, target) - 1, np.minimum(source, target) - 1
        return longer > np.where(longer <= _SHORT, max(_SHORT_RATIO, self.max_ratio), self.max_ratio) * shorter


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

    The file is keyed by the text's and tokenizer's content and the limit, and appears in one rename. Pairs
    keep their order.

    Args:
        text: pairs; a side that has no piece (blank, or blank once normalised) drops its pair.
        tokenizer: a joint Marian tokenizer, or its folder.
        cache_dir: made where it is missing.
        num_proc: cores that encode. SentencePiece's own threads use them, nothing is forked or pickled.
        max_length: the most ids a side may have, eos included; longer pairs are dropped.
        max_ratio: the longer side's pieces over the shorter's; see `LengthLimit`.

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
    if not folder.is_dir():
        with atomic_folder(folder) as unfinished:
            counts = _write_pairs(unfinished / "pairs.arrow", text, tokenizer, limit, num_proc)
            (unfinished / "counts.json").write_text(json.dumps(counts))
    try:
        counts = json.loads((folder / "counts.json").read_text())
        return datasets.Dataset.from_file(str(folder / "pairs.arrow")), counts
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"the cached pairs in {folder} cannot be read ({error}); remove that folder") from error


def lengths(dataset: datasets.Dataset) -> NDArray[np.int32]:
    """The `length` column, the longer side of each pair in ids; the ids themselves are not read."""
    table = dataset.select_columns("length").with_format("arrow")[:]
    return table["length"].to_numpy()


class TokenPairs(torch.utils.data.Dataset[dict[str, NDArray[np.int32]]]):
    """The samples of an encoded data set as numpy views of its memory-mapped file.

    A sample costs about a microsecond against some 15 through `datasets` (which builds Python lists). Torch's
    DataLoader fetches a whole batch by `__getitems__`; a copy sent to a worker is a file name.
    """

    columns = ("input_ids", "labels")

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        table = dataset.with_format("arrow")[:]
        self._columns = [_Column.of(table[name]) for name in self.columns]
        self._chunk_ends = np.cumsum([len(chunk) for chunk in table[self.columns[0]].chunks])

    def __reduce__(self) -> tuple[type[TokenPairs], tuple[datasets.Dataset]]:
        return TokenPairs, (self.dataset,)

    def __len__(self) -> int:
        return int(self._chunk_ends[-1])

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Ids of all sources and of all targets, eos included."""
        source, target = (int((column.ends - column.starts).sum(dtype=np.int64)) for column in self._columns)
        return source, target

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int32]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, NDArray[np.int32]]]:
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"sample indices must lie in [0, {len(self)}), got {rows.min()} to {rows.max()}")
        chunks = np.searchsorted(self._chunk_ends, rows, side="right").tolist()
        inputs, labels = (column.rows(rows, chunks) for column in self._columns)
        return [{"input_ids": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


class _Column(NamedTuple):
    """A list column: row n is `values[chunk of n][starts[n]:ends[n]]`; only starts and ends are in memory."""

    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    values: list[NDArray[np.int32]]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> _Column:
        offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        starts = np.concatenate([chunk[:-1] for chunk in offsets])
        ends = np.concatenate([chunk[1:] for chunk in offsets])
        return cls(starts, ends, [chunk.values.to_numpy() for chunk in column.chunks])

    def rows(self, rows: NDArray[np.int64], chunks: list[int]) -> list[NDArray[np.int32]]:
        bounds = zip(chunks, self.starts[rows].tolist(), self.ends[rows].tolist(), strict=True)
        return [self.values[chunk][start:end] for chunk, start, end in bounds]


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

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Pad a batch; the samples hold lists or arrays of ids."""
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

    def _pad(self, rows: Sequence[Any], fill: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows as a matrix, and where it holds theirs."""
        row_lengths = np.array([len(row) for row in rows])
        is_real = np.arange(row_lengths.max()) < row_lengths[:, None]
        padded = np.full(is_real.shape, fill, dtype=np.int64)
        padded[is_real] = np.concatenate(rows)
        return padded, is_real


def _cache_key(text: ParallelText, tokenizer: MarianTokenizer, limit: LengthLimit) -> str:
    decides = [_LAYOUT, fingerprint(text), tokenizer_fingerprint(tokenizer), asdict(limit)]
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def _write_pairs(
    path: Path, text: ParallelText, tokenizer: MarianTokenizer, limit: LengthLimit, num_proc: int
) -> dict[str, int]:
    counts = dict.fromkeys(DROP_REASONS, 0)
    num_kept = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for source, target in _encoded_chunks(text, tokenizer, num_proc):
            source, target = _admit(source, target, limit, counts)
            num_kept += len(source.lengths)
            writer.write_batch(_record_batch(source, target))
    if not num_kept:
        raise DataError(f"no pair is left of {len(text)}: {describe_dropped(counts)}")
    return counts


def _encoded_chunks(text: ParallelText, tokenizer: MarianTokenizer, num_proc: int) -> Iterator[tuple[Ragged, Ragged]]:
    encode_source = LineEncoder(tokenizer, is_target=False)
    encode_target = LineEncoder(tokenizer, is_target=True)
    for start in range(0, len(text), _CHUNK):
        pairs = slice(start, start + _CHUNK)
        yield encode_source(text.source[pairs], num_proc), encode_target(text.target[pairs], num_proc)


def _admit(source: Ragged, target: Ragged, limit: LengthLimit, counts: dict[str, int]) -> tuple[Ragged, Ragged]:
    """Apply the rules about lengths to a chunk, and add what they did to `counts`."""
    lengths = np.maximum(source.lengths, target.lengths)
    is_empty = (source.lengths <= 1) | (target.lengths <= 1)  # nothing but eos
    is_long = ~is_empty & (lengths > (limit.max_length or np.inf))
    is_uneven = ~(is_empty | is_long) & limit.is_uneven(source.lengths, target.lengths)
    for reason, is_dropped in zip(DROP_REASONS, (is_empty, is_long, is_uneven), strict=True):
        counts[reason] += int(is_dropped.sum())
    keep = ~(is_empty | is_long | is_uneven)
    return _select(source, keep), _select(target, keep)


def _select(rows: Ragged, keep: NDArray[np.bool_]) -> Ragged:
    if keep.all():
        return rows
    return Ragged(rows.values[np.repeat(keep, rows.lengths)], rows.lengths[keep])


def _record_batch(source: Ragged, target: Ragged) -> pa.RecordBatch:
    def column(rows: Ragged) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.values))

    longer = pa.array(np.maximum(source.lengths, target.lengths))
    return pa.record_batch([column(source), column(target), longer], schema=_SCHEMA)
