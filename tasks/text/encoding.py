"""Ids of many lines at once, exactly those that the tokenizer would give line by line; text stays text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import MarianTokenizer, PreTrainedTokenizerBase

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


def special_as_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[list[str], int]:
    """Texts for a call of the tokenizer with `split_special_tokens=True`, which reads none of their special tokens.

    Some tokenizers (Unigram models such as T5's) have the special tokens among their pieces and read `</s>` as one even
    then; there a space is put behind its first character.

    Returns:
        The texts, and how many of them hold a special token.
    """
    names = [name for name in _special_tokens(tokenizer) if any(name in text for text in texts)]
    if not names:
        return list(texts), 0
    special = set(tokenizer.convert_tokens_to_ids(names)) - {tokenizer.unk_token_id}
    options = {"add_special_tokens": False, "split_special_tokens": True}
    read_anyway = {name for name in names if special & set(tokenizer(name, **options).input_ids)}
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def spelt(found: re.Match[str]) -> str:
        return f"{found[0][0]} {found[0][1:]}" if found[0] in read_anyway else found[0]

    return [pattern.sub(spelt, text) for text in texts], sum(pattern.search(text) is not None for text in texts)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added.union(tokenizer.all_special_tokens)
