"""Ids of many lines at once, exactly those that the tokenizer would give line by line."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import MarianTokenizer

from tasks.cli.errors import DataError


class LineEncoder:
    """The ids of many lines of one side, exactly `MarianTokenizer`'s, by SentencePiece's batch encoder.

    Lines in which the tokenizer looks for more than pieces go through the tokenizer: those with a special
    token's text (`</s>`), with a language code in front (`>>de<<`), or with a character unknown to SentencePiece.
    """

    def __init__(self, tokenizer: MarianTokenizer, *, is_target: bool) -> None:
        if tokenizer.separate_vocabs:
            raise DataError("the tokenizer has separate vocabularies; a joint one is needed (train_tokenizer)")
        self.tokenizer, self.is_target = tokenizer, is_target
        self.processor = tokenizer.spm_target if is_target else tokenizer.spm_source
        pieces = [self.processor.id_to_piece(i) for i in range(self.processor.get_piece_size())]
        self._ids: list[int] = tokenizer.convert_tokens_to_ids(pieces)
        self._same_ids = self._ids == list(range(len(pieces)))  # as of `train_tokenizer`
        self._added = tuple(tokenizer.get_added_vocab())

    def __call__(self, lines: Sequence[str], num_proc: int = 1) -> list[list[int]]:
        """Encode, eos appended."""
        pieces = self.processor.encode(list(lines), out_type=int, add_eos=True, num_threads=num_proc)
        rows: list[list[int]] = pieces if self._same_ids else [[self._ids[i] for i in row] for row in pieces]
        joined, unknown = "\n".join(lines), self.processor.unk_id()
        marked = any(mark in joined for mark in (">>", *self._added))  # seldom; a look at memory speed
        for n, line in enumerate(lines):
            if unknown in pieces[n] or (marked and self._is_marked(line)):
                encoded = self.tokenizer(**{"text_target" if self.is_target else "text": line})
                rows[n] = list(encoded["input_ids"])
        return rows

    def _is_marked(self, line: str) -> bool:
        return line.startswith(">>") or any(token in line for token in self._added)
