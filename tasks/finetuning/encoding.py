"""From the rows of a split to token ids; what is cut or left out is counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tasks.cli.errors import DataError, reason_of
from tasks.finetuning.config import CAUSAL, SEQ2SEQ
from tasks.text.data_sets import is_chat, without_cache_files
from tasks.text.encoding import special_as_text


def encode(
    rows: Dataset,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source_prefix: str = "",
    *,
    parse_special_tokens: bool = False,
) -> tuple[Dataset, Counter[str]]:
    """Token ids of every row, with its labels, without padding.

    The labels are the target's ids, the text's own, or the class, by the task. A causal text ends with the
    end-of-sequence token, unless it was cut; a chat is written by the tokenizer's template. Special tokens that stand
    in a text are text (`special_as_text`) unless `parse_special_tokens`; those of the template are tokens.

    Returns:
        The encoded rows, and how many were `cut`, or dropped as `blank` (a side has no token, or only space) or as
        `short` (a causal text of one token); and how many texts are `marked`: a special token stands in them as text.

    Raises:
        DataError: the tokenizer has no template for chats, or its template refuses one.
    """
    encoder = _Encoder(task, tokenizer, max_length, source_prefix, parse_special_tokens)
    if task == CAUSAL and is_chat(rows.features["text"]):
        encoder.write_chats()
    with without_cache_files():
        encoded = rows.map(encoder, batched=True, remove_columns=rows.column_names, desc="tokenizing")
    return encoded, encoder.counts


class _Encoder:
    def __init__(
        self, task: str, tokenizer: PreTrainedTokenizerBase, max_length: int, prefix: str, parse: bool
    ) -> None:
        self._task, self._tokenizer, self._max_length, self._prefix = task, tokenizer, max_length, prefix
        self._parses_special_tokens, self._writes_chats = parse, False
        self._special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self.counts: Counter[str] = Counter()

    def write_chats(self) -> None:
        """Take texts for chats: lists of messages, with a role and a content."""
        if self._tokenizer.chat_template is None:
            raise DataError(
                "the texts are chats, and the model's tokenizer has no chat template: give one in its folder as "
                "chat_template.jinja, or write the chats as texts"
            )
        self._writes_chats = self._parses_special_tokens = True

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if self._writes_chats:
            batch = {"text": [self._written(messages) for messages in batch["text"]]}
        batch = self._filled(batch)
        if not any(batch.values()):
            return {"input_ids": [], "labels": []}
        if self._task == SEQ2SEQ:
            sources, source_cut = self._ids(text=[self._prefix + text for text in batch["source"]])
            targets, target_cut = self._ids(text_target=batch["target"])
            self.counts["cut"] += sum(map(any, zip(source_cut, target_cut, strict=True)))
            return self._with_tokens({"input_ids": sources["input_ids"], "labels": targets["input_ids"]})
        labels = batch.pop("label", [])
        texts, was_cut = self._ids(**batch)
        self.counts["cut"] += sum(was_cut)
        if self._task == CAUSAL:
            return self._ended(self._with_tokens(texts)["input_ids"])
        return self._with_tokens({**texts, "labels": labels})

    def _written(self, messages: list[dict[str, Any]] | None) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
        except Exception as error:  # of the template: such as roles that do not take turns
            raise DataError(f"the tokenizer's template refuses a chat ({reason_of(error)}): {messages}") from error

    def _filled(self, batch: dict[str, list]) -> dict[str, list]:
        """The rows with text on every side."""
        rows = list(zip(*(column for name, column in batch.items() if name != "label"), strict=True))
        return self._kept(batch, [all((text or "").strip() for text in texts) for texts in rows])

    def _with_tokens(self, columns: dict[str, list]) -> dict[str, list]:
        """The rows with a token of text on every side."""
        sides = [columns["input_ids"]] + ([columns["labels"]] if self._task == SEQ2SEQ else [])
        return self._kept(columns, [all(set(ids) - self._special for ids in row) for row in zip(*sides, strict=True)])

    def _kept(self, columns: dict[str, list], keep: list[bool]) -> dict[str, list]:
        self.counts["blank"] += len(keep) - sum(keep)
        return {name: [x for x, kept in zip(column, keep, strict=True) if kept] for name, column in columns.items()}

    def _ids(self, **texts: list[str]) -> tuple[dict[str, list], list[bool]]:
        """The tokenizer's ids of `text`, with its `text_pair`, or of `text_target`; and which rows were cut."""
        options = {"return_attention_mask": False, "return_token_type_ids": "text_pair" in texts, "verbose": False}
        options["add_special_tokens"] = not self._writes_chats
        if not self._parses_special_tokens:
            options["split_special_tokens"] = True
            for name, side in texts.items():
                texts[name], marked = special_as_text(self._tokenizer, side)
                self.counts["marked"] += marked
        encoded = self._tokenizer(**texts, **options)
        was_cut = [len(ids) > self._max_length for ids in encoded["input_ids"]]
        if any(was_cut):
            encoded = self._tokenizer(**texts, **options, truncation=True, max_length=self._max_length)
        return dict(encoded), was_cut

    def _ended(self, rows: list[list[int]]) -> dict[str, list]:
        """Causal texts with the end-of-sequence token, which a chat's template writes itself."""
        eos = self._tokenizer.eos_token_id
        if eos is not None and not self._writes_chats:
            rows = [ids if ids[-1] == eos or len(ids) >= self._max_length else [*ids, eos] for ids in rows]
        long = [ids for ids in rows if len(ids) > 1]  # nothing would follow a single token
        self.counts["short"] += len(rows) - len(long)
        return {"input_ids": long, "labels": long}
