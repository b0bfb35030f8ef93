"""Ids of many lines at once, exactly those that the tokenizer would give line by line."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import MarianTokenizer

from tasks.cli.errors import DataError


class LineEncoder:
    """The ids of many lines of one side, exactly `MarianTokenizer`'s, by SentencePiece's batch encoder.

    Text is text: `</s>` or `<pad>` inside a line is spelt in pieces, and becomes no special token. Lines go through the
    tokenizer where it looks for more than pieces: those with a token that was added to it, with a language code of its
    own in front (`>>de<<`), or with a character unknown to SentencePiece.
    """

    def __init__(self, tokenizer: MarianTokenizer, *, is_target: bool) -> None:
        if tokenizer.separate_vocabs:
            raise DataError("the tokenizer has separate vocabularies; a joint one is needed (train_tokenizer)")
        self.tokenizer, self.is_target = tokenizer, is_target
        self.processor = tokenizer.spm_target if is_target else tokenizer.spm_source
        pieces = [self.processor.id_to_piece(i) for i in range(self.processor.get_piece_size())]
        self._ids: list[int] = tokenizer.convert_tokens_to_ids(pieces)
        self._same_ids = self._ids == list(range(len(pieces)))  # as of `train_tokenizer`

        self._added = set(tokenizer.get_added_vocab()).difference(tokenizer.all_special_tokens)

    def __call__(self, lines: Sequence[str], num_proc: int = 1) -> list[list[int]]:
        """Encode, eos appended."""
        pieces = self.processor.encode(list(lines), out_type=int, add_eos=True, num_threads=num_proc)
        rows: list[list[int]] = pieces if self._same_ids else [[self._ids[i] for i in row] for row in pieces]
        joined, unknown = "\n".join(lines), self.processor.unk_id()
        added = [token for token in self._added if token in joined]  # seldom; a look at memory speed
        for n, line in enumerate(lines):
            is_coded = line.startswith(">>") and self._has_language_code(line)
            if unknown in pieces[n] or is_coded or any(token in line for token in added):
                side = {"text_target" if self.is_target else "text": line}
                encoded = self.tokenizer(**side, split_special_tokens=True)
                rows[n] = list(encoded["input_ids"])
        return rows

    def _has_language_code(self, line: str) -> bool:
        end = line.find("<<")
        return end > 0 and line[: end + 2] in self.tokenizer.get_vocab()
