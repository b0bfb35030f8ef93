"""Translations and their score: beam search in batches of like length, BLEU with its signature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from sacrebleu.metrics import BLEU
from transformers import MarianMTModel, MarianTokenizer


@dataclass(frozen=True)
class BleuScore:
    """A BLEU (0 to 100) and everything that another number must share to be compared with it.

    `signature` is sacreBLEU's; `decoding` names the beam and the formula of the length penalty.
    """

    bleu: float
    signature: str
    decoding: str

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.2f} ({self.signature}; {self.decoding})"


def score_bleu(hypotheses: Sequence[str], references: Sequence[str], decoding: str) -> BleuScore:
    """Corpus BLEU of detokenised text, by sacreBLEU.

    Raises:
        ValueError: the numbers of lines differ, or there are none.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses cannot be scored against {len(references)} references")
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return BleuScore(score.score, str(metric.get_signature()), decoding)


def describe_decoding(num_beams: int, length_penalty: float) -> str:
    """Beam width and the formula that ranks finished beams: transformers', not GNMT's ((5+L)/6)^a.

    >>> describe_decoding(4, 0.6)
    'beam 4, log-probability / L^0.6'
    """
    if num_beams == 1:
        return "greedy, no length penalty"
    return f"beam {num_beams}, log-probability / L^{length_penalty}"


@torch.inference_mode()
def translate(
    accelerator: Accelerator,
    model: MarianMTModel,
    tokenizer: MarianTokenizer,
    sources: Sequence[str],
    *,
    max_tokens: int = 4_096,
    **generation: Any,
) -> list[str]:
    """Translate sentences in any order and length; every rank does its share, and all get all translations.

    Args:
        accelerator: says which share is this rank's, and the precision.
        model: on the device; its training mode is put back afterwards.
        tokenizer: the model's.
        sources: sentences; an empty one is translated like any other, one longer than the model's positions is cut
            (`count_truncated`).
        max_tokens: padded source tokens of a batch; like lengths share a batch.
        generation: what `generate` should do otherwise than the model's `generation_config`, and than stopping at
            twice the longest source of a batch plus 20 pieces.

    Returns:
        One translation a source, in their order.
    """
    was_training = model.training
    model.eval()
    ids = [
        tokenizer(text, truncation=True, max_length=model.config.max_position_embeddings).input_ids for text in sources
    ]
    mine = list(range(len(ids)))[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, str]] = []
    with accelerator.autocast():
        for batch in _batches_by_length(mine, ids, max_tokens):
            padded = tokenizer.pad({"input_ids": [ids[n] for n in batch]}, return_tensors="pt").to(accelerator.device)
            output = model.generate(**padded, **{**_length_limit(model, padded.input_ids.shape[1]), **generation})
            found += zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
    model.train(was_training)
    translations = dict(gather_object(found))
    return [translations[n] for n in range(len(ids))]


def _length_limit(model: MarianMTModel, source_length: int) -> dict[str, int]:
    """Twice the source and 20 pieces more: a model that has not learnt to stop would fill every position."""
    return {"max_new_tokens": min(2 * source_length + 20, model.config.max_position_embeddings - 1)}


def count_truncated(model: MarianMTModel, tokenizer: MarianTokenizer, sources: Sequence[str]) -> int:
    """How many sentences have more pieces than the model has positions, and are cut by `translate`."""
    return sum(len(tokenizer(text).input_ids) > model.config.max_position_embeddings for text in sources)


def _batches_by_length(numbers: list[int], ids: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Sentences of like length together, longest first, at most `max_tokens` padded tokens a batch."""
    batches: list[list[int]] = []
    for n in sorted(numbers, key=lambda n: -len(ids[n])):
        if batches and (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) <= max_tokens:
            batches[-1].append(n)
        else:
            batches.append([n])
    return batches
