"""The joint vocabulary: one SentencePiece BPE over both languages, as a tokenizer folder of transformers."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import MarianTokenizer

from tasks.cli.cache import fill_cache
from tasks.text.parallel import DataError, ParallelText, fingerprint

# SentencePiece's ids are the ids of vocab.json, so that its own batch encoder gives the model's ids.
# No bos: Marian's decoder starts with pad.
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

TRAINING_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "pad_id": PAD_ID,
    "pad_piece": PAD,
    "eos_id": EOS_ID,
    "eos_piece": EOS,
    "unk_id": UNK_ID,
    "unk_piece": UNK,
    "bos_id": -1,
    # Characters that make up the rarest 1/10 000 of the text (one line in Chinese, an emoji) are spelt in
    # bytes, 256 pieces, and take no piece each; no text whatsoever is unknown, and decoding returns it.
    "character_coverage": 0.9999,
    "byte_fallback": True,
    "max_sentence_length": 1 << 20,  # bytes; SentencePiece silently skips longer lines, from 4192 by default
    "num_threads": 4,  # stored in the model, without effect on the pieces: fixed, so that equal text is equal bytes
    "minloglevel": 2,  # errors only; they are raised
}
# What a text becomes before it is cut into pieces. "identity" loses nothing that a reference may hold; the others fold
# compatibility characters ("…" to "...", full-width to plain, "ﬁ" to "fi"), which no translation can then contain.
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
MAX_TRAINING_LINES = 4_000_000  # of both sides; of a larger text evenly spaced pairs are used
_LAYOUT = 1  # of the folder; raise it and cached folders are made anew


def train_tokenizer(
    text: ParallelText, vocab_size: int, cache_dir: str | Path, *, normalization: str = "identity"
) -> Path:
    """Train the joint tokenizer of a parallel text, or find it in the cache, and return its folder.

    `AutoTokenizer.from_pretrained(folder)` loads it as a `MarianTokenizer` with `<pad>` 0, `</s>` 1, `<unk>` 2,
    and 256 byte pieces. The folder is keyed by the text's content and the size, and appears in one rename:
    whole, or not at all. The same text gives the same bytes (no random sampling, a fixed thread count). `vocab_size`
    counts the special and byte pieces too; above `MAX_TRAINING_LINES` lines, evenly spaced pairs are used.
    `normalization` is one of `NORMALIZATIONS`, and applies to whatever the tokenizer encodes.

    Raises:
        DataError: the text is blank, or `vocab_size` is more than it allows or less than its characters need.
    """
    options = {**TRAINING_OPTIONS, "normalization_rule_name": normalization}
    folder = Path(cache_dir) / f"tokenizer-{_cache_key(text, vocab_size, options)}"
    fill_cache(folder, lambda unfinished: _write_tokenizer(_train_sentencepiece(text, vocab_size, options), unfinished))
    return folder


def load_tokenizer(folder: str | Path) -> MarianTokenizer:
    """Load a Marian tokenizer folder, without the advice to install sacremoses.

    `MarianTokenizer` (transformers 5) no longer normalises punctuation when it encodes, so sacremoses would
    change nothing; every other warning is let through.

    Raises:
        DataError: the folder is missing or holds no tokenizer.
    """
    needed = ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json")
    missing = [name for name in needed if not (Path(folder) / name).is_file()]
    if missing:
        raise DataError(f"{folder} is not a tokenizer folder: it has no {', '.join(missing)}")
    with _no_sacremoses_advice():
        return MarianTokenizer.from_pretrained(str(folder))


def tokenizer_fingerprint(tokenizer: MarianTokenizer) -> str:
    """Name a tokenizer by what decides its ids: both SentencePiece models, the vocabulary, added tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for model in (tokenizer.spm_source, tokenizer.spm_target):
        digest.update(hashlib.blake2b(model.serialized_model_proto()).digest())
    vocabulary = [tokenizer.encoder, getattr(tokenizer, "target_encoder", None), tokenizer.get_added_vocab()]
    digest.update(json.dumps(vocabulary, sort_keys=True).encode())
    return digest.hexdigest()


def _cache_key(text: ParallelText, vocab_size: int, options: dict[str, Any]) -> str:
    decides = [_LAYOUT, vocab_size, MAX_TRAINING_LINES, options, fingerprint(text)]
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def _train_sentencepiece(text: ParallelText, vocab_size: int, options: dict[str, Any]) -> bytes:
    if not any(line.strip() for line in _training_lines(text)):
        raise DataError("the text is blank: there is nothing to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(text),
            model_writer=model,
            vocab_size=max(vocab_size, UNK_ID + 2),  # below, SentencePiece's message has no number to pass on
            **options,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _explained(str(error), vocab_size) from error
    return model.getvalue()


def _training_lines(text: ParallelText) -> Iterator[str]:
    stride = -(-2 * len(text) // MAX_TRAINING_LINES)  # rounded up
    for side in (text.source, text.target):
        for n in range(0, len(side), max(stride, 1)):
            yield side[n]


def _explained(message: str, vocab_size: int) -> DataError:
    """SentencePiece's complaint as the user's choice; its numbers are kept where they can be found."""
    if most := re.search(r"too high .*<= (\d+)", message):
        return DataError(
            f"a vocabulary of {vocab_size} pieces is larger than this text allows: at most {most[1]} "
            "(one piece for each of its words); take a smaller vocabulary (--vocab-size) or more text"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"a vocabulary of {vocab_size} pieces is too small for the characters of this text: "
            f"at least {least[1]}, the special and byte pieces included; take a larger one (--vocab-size)"
        )
    return DataError(f"SentencePiece could not train a vocabulary of {vocab_size} pieces: {message}")


def _write_tokenizer(model: bytes, folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    with _no_sacremoses_advice():
        tokenizer = MarianTokenizer(
            source_spm=str(folder / "source.spm"),
            target_spm=str(folder / "target.spm"),
            vocab=str(folder / "vocab.json"),
            pad_token=PAD,
            eos_token=EOS,
            unk_token=UNK,
            separate_vocabs=False,
            clean_up_tokenization_spaces=False,  # "Hallo , Welt" decodes as it was
        )
    tokenizer.save_pretrained(str(folder))


@contextmanager
def _no_sacremoses_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        yield
