"""Translations by search: sentences of like length share a batch, and the batch they are in changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import MarianTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationConfig

from tasks.cli.log import progress_bar
from tasks.decoding.beam_cache import CACHE, BeamCache
from tasks.decoding.mc_dropout import averaged_over_masks
from tasks.decoding.skip_finished import skip_finished
from tasks.text.encoding import LineEncoder, special_as_text

POWER, GNMT_RERANK = "power", "gnmt-rerank"
LENGTH_PENALTIES = (POWER, GNMT_RERANK)

_MAX_TOKENS = {"cpu": 1_024}  # padded source tokens of a batch: a processor gains nothing from more
_MAX_TOKENS_ELSEWHERE = 8_192
_LENGTH_STEP = 8  # source lengths are rounded up to a multiple of it, so that like lengths have one limit
_MAX_SCORES = 1 << 28  # numbers of the scores that re-ranking keeps: 1 GiB
_NO_LIMIT = 1_000_000  # a tokenizer that knows no longest input says 10^30

# What else in a model's own settings changes the search; with the value that leaves it alone.
_OTHER_SETTINGS: dict[str, Any] = {
    "early_stopping": False, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "min_length": 0, "min_new_tokens": None, "forced_bos_token_id": None,
    "exponential_decay_length_penalty": None, "renormalize_logits": False,
}  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """How a translation is searched for, and which of the finished ones is taken.

    L counts the pieces of a translation after the start token, its eos included.

    Args:
        num_beams: width of the beam search; 1 is greedy, without a length penalty.
        length_penalty: a.
        length_penalty_kind: "power" ranks by log-probability / L^a, as transformers and fairseq do; "gnmt-rerank"
            takes the finished beams of that search and ranks them by log-probability / ((5 + L) / 6)^a (Wu et al.
            2016, eq. 14). It is not GNMT's search, which prunes and stops by that formula too.
        num_masks: N of `averaged_over_masks`, Monte Carlo dropout; 0 decodes without dropout.

    >>> str(Decoding(num_beams=4, length_penalty=0.6))
    'beam 4, log-probability / L^0.6'
    """

    num_beams: int = 4
    length_penalty: float = 0.6
    length_penalty_kind: str = POWER
    num_masks: int = 0

    def __str__(self) -> str:
        power = f"log-probability / L^{self.length_penalty}"
        if self.num_beams == 1:
            said = "greedy, no length penalty"
        elif self.length_penalty_kind == GNMT_RERANK:
            said = (
                f"beam {self.num_beams} by {power}, its finished beams re-ranked by "
                f"log-probability / ((5+L)/6)^{self.length_penalty}"
            )
        else:
            said = f"beam {self.num_beams}, {power}"
        return said + (f", mean of {self.num_masks} dropout masks' probabilities" if self.num_masks else "")


@torch.inference_mode()
def translate(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    decoding: Decoding | None = None,
    max_tokens: int | None = None,
    **generation: Any,
) -> list[str]:
    """Translate sentences in any order and length; every rank does its share, and all get all translations.

    A sentence's translation does not depend on the sentences that it shares a batch with (Monte Carlo dropout aside,
    whose masks are drawn for a batch). One longer than the model takes is cut (`count_truncated`).

    Args:
        model: any encoder-decoder with `generate`, on the device; its training mode is put back afterwards.
        decoding: the search; by default what the model's `generation_config` says.
        max_tokens: padded source tokens of a batch; by default 1 024 on a processor and 8 192 elsewhere.
        generation: what `generate` should do otherwise than these, and than stopping at `max_new_tokens`.
    """
    was_training = model.training
    model.eval()
    ids = encode_sources(model, tokenizer, sources)
    limits = [max_new_tokens(model, len(row)) for row in ids]
    mine = range(accelerator.process_index, len(ids), accelerator.num_processes)
    if max_tokens is None:
        max_tokens = _MAX_TOKENS.get(accelerator.device.type, _MAX_TOKENS_ELSEWHERE)
    max_scores = _max_score_rows(model, decoding)
    num_masks = decoding.num_masks if decoding else 0
    found: list[tuple[int, str]] = []
    with (
        accelerator.autocast(),
        averaged_over_masks(model, num_masks) if num_masks else nullcontext(),
        skip_finished(model),
        progress_bar("sentence", len(mine), accelerator.is_main_process, desc="translating") as bar,
    ):
        for batch in _batches_by_length(mine, ids, limits, max_tokens, max_scores):
            padded = tokenizer.pad({"input_ids": [ids[n] for n in batch]}, return_tensors="pt").to(accelerator.device)
            settings = {"max_length": None, "max_new_tokens": limits[batch[0]], **generation}
            output = _search(
                model, {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}, decoding, settings
            )
            found += zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
            bar.update(len(batch))
    model.train(was_training)
    translations = dict(gather_object(found))
    return [translations[n] for n in range(len(ids))]


def _search(
    model: PreTrainedModel, batch: dict[str, Tensor], decoding: Decoding | None, settings: dict[str, Any]
) -> Tensor:
    """The best translation of every sentence: (B, S) -> (B, T), padded."""
    num_masks = decoding.num_masks if decoding else 0
    cache = BeamCache(model.config, num_copies=max(1, num_masks))
    settings = {
        CACHE: cache, "use_cache": True, "cache_implementation": None, "return_dict_in_generate": False, **settings
    }  # fmt: skip
    if decoding is None:
        return model.generate(**batch, **settings)
    # length_penalty None would be filled from the model's own settings; greedy search does not read it
    settings |= {"num_beams": decoding.num_beams, "do_sample": False, "length_penalty": decoding.length_penalty}
    if decoding.num_beams == 1 or decoding.length_penalty_kind == POWER:
        return model.generate(**batch, **settings, num_return_sequences=1)
    output = model.generate(
        **batch,
        **settings | {"return_dict_in_generate": True},
        num_return_sequences=decoding.num_beams,
        output_scores=True,
    )
    lengths = (output.beam_indices >= 0).sum(dim=1)
    return rerank(output.sequences, output.sequences_scores * lengths**decoding.length_penalty, lengths, decoding)


def rerank(sequences: Tensor, log_probabilities: Tensor, lengths: Tensor, decoding: Decoding) -> Tensor:
    """Of the finished beams of each sentence, the one with the highest log-probability / ((5 + L) / 6)^a: (B, T).

    `sequences` are (B*beams, T), the beams of a sentence next to each other; `log_probabilities` (nats of the whole
    sequence) and `lengths` (L) are (B*beams,).
    """
    scores = log_probabilities / ((5 + lengths) / 6) ** decoding.length_penalty
    best = scores.view(-1, decoding.num_beams).argmax(dim=1)
    return sequences.unflatten(0, (-1, decoding.num_beams))[torch.arange(len(best), device=best.device), best]


def describe_other_settings(settings: GenerationConfig) -> str:
    """A model's own settings that change a search besides its beams and length penalty; "" where there are none.

    >>> describe_other_settings(GenerationConfig(no_repeat_ngram_size=3, num_beams=2))
    'no_repeat_ngram_size 3'
    """
    values = {name: getattr(settings, name, neutral) for name, neutral in _OTHER_SETTINGS.items()}
    return ", ".join(
        f"{name} {value}" for name, value in values.items() if value is not None and value != _OTHER_SETTINGS[name]
    )


def encode_sources(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]
) -> list[list[int]]:
    """The ids of the sources, cut to what the model takes, unpadded."""
    limit = max_source_length(model, tokenizer)
    if _is_joint_marian(tokenizer):
        rows = _encode_lines(tokenizer, sources)
        return [row if limit is None or len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows]
    return _encode_texts(tokenizer, sources, **({} if limit is None else {"truncation": True, "max_length": limit}))


def count_truncated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> int:
    """How many sentences have more pieces than the model takes, and are cut by `translate`."""
    limit = max_source_length(model, tokenizer)
    if limit is None:
        return 0
    rows = _encode_lines(tokenizer, sources) if _is_joint_marian(tokenizer) else _encode_texts(tokenizer, sources)
    return sum(len(row) > limit for row in rows)


def max_source_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most pieces of a source: the model's positions or what its tokenizer states; None where neither is known."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        positions -= _positions_before_the_first(model)
    known = [positions, tokenizer.model_max_length]
    return min((limit for limit in known if limit is not None and limit < _NO_LIMIT), default=None)


def _positions_before_the_first(model: PreTrainedModel) -> int:
    """RoBERTa's kind counts positions from behind the padding id, which its table of positions has a row for."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _is_joint_marian(tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer, MarianTokenizer) and not tokenizer.separate_vocabs


def _encode_lines(tokenizer: MarianTokenizer, sources: Sequence[str]) -> list[list[int]]:
    """The tokenizer's own ids, by SentencePiece's batch encoder."""
    return LineEncoder(tokenizer, is_target=False)(sources)


def _encode_texts(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], **options: Any) -> list[list[int]]:
    return tokenizer(special_as_text(tokenizer, sources)[0], split_special_tokens=True, **options).input_ids


def max_new_tokens(model: PreTrainedModel, source_length: int) -> int:
    """The most pieces of a translation: a model that has not learnt to stop would fill every position.

    Twice the source, rounded up, and 20 more.
    """
    limit = 2 * -(-source_length // _LENGTH_STEP) * _LENGTH_STEP + 20
    positions = getattr(model.config, "max_position_embeddings", None)
    return limit if positions is None else min(limit, positions - 1)


def _max_score_rows(model: PreTrainedModel, decoding: Decoding | None) -> int | None:
    """How many sentences times pieces re-ranking can keep scores (beams, V) of; None where none are kept."""
    if decoding is None or decoding.length_penalty_kind == POWER or decoding.num_beams == 1:
        return None
    return _MAX_SCORES // (decoding.num_beams * model.get_output_embeddings().weight.shape[0])


def _batches_by_length(
    numbers: Sequence[int], ids: list[list[int]], limits: list[int], max_tokens: int, max_scores: int | None
) -> Iterator[list[int]]:
    """Sentences of like length together, longest first; a batch has one limit on new pieces, that of its sentences.

    At most `max_tokens` padded source tokens and `max_scores` sentences times new pieces; one sentence at least.
    """
    ordered = sorted(numbers, key=lambda n: -len(ids[n]))
    for limit, group in itertools.groupby(ordered, key=lambda n: limits[n]):
        batch: list[int] = []
        for n in group:
            full = batch and (len(batch) + 1) * len(ids[batch[0]]) > max_tokens
            if full or (batch and max_scores is not None and (len(batch) + 1) * limit > max_scores):
                yield batch
                batch = []
            batch.append(n)
        yield batch
