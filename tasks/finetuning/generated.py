"""Small new models, and the generated text as a data set of each task, for runs without --model and --dataset."""

from __future__ import annotations

from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tasks.finetuning.config import CAUSAL, CLASSIFICATION, SEQ2SEQ
from tasks.models.transformer import build_model
from tasks.text.generated.corpus import generate_corpus
from tasks.text.parallel import ParallelText
from tasks.text.tokenizer import load_tokenizer, train_tokenizer

_VOCAB_SIZE, _WIDTH, _NUM_LAYERS, _NUM_HEADS, _POSITIONS = 1_000, 128, 2, 4, 128  # and every dropout is 0.1
_LABELS = ["statement", "question"]


def generate_data(task: str) -> DatasetDict:
    """The built-in English-German corpus as a data set in three splits.

    Translation pairs (`source`, `target`), English sentences (`text`), or English sentences without their full stop or
    question mark, and which of the two it was (`text`, `label`).
    """
    corpus = generate_corpus()
    return DatasetDict({"validation" if name == "valid" else name: _split(task, text) for name, text in corpus.items()})


def generate_model(task: str, cache_dir: str, seed: int) -> tuple[PreTrainedModel, Any]:
    """A small model with new weights, and the tokenizer of the generated corpus."""
    tokenizer = load_tokenizer(train_tokenizer(generate_corpus()["train"], _VOCAB_SIZE, cache_dir))
    torch.manual_seed(seed)
    eos = tokenizer.eos_token_id
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": _WIDTH, "num_hidden_layers": _NUM_LAYERS, "num_attention_heads": _NUM_HEADS,
             "max_position_embeddings": _POSITIONS}  # fmt: skip
    if task == CAUSAL:
        return GPT2LMHeadModel(GPT2Config(**tokens, **sizes, bos_token_id=eos, eos_token_id=eos)), tokenizer
    if task == CLASSIFICATION:
        names = {"id2label": dict(enumerate(_LABELS)), "label2id": {name: n for n, name in enumerate(_LABELS)}}
        config = BertConfig(**tokens, **sizes, intermediate_size=4 * _WIDTH, num_labels=len(_LABELS), **names)
        return BertForSequenceClassification(config), tokenizer
    model = build_model(
        **tokens, eos_token_id=eos, width=_WIDTH, num_layers=_NUM_LAYERS, num_heads=_NUM_HEADS, max_length=_POSITIONS
    )
    return model, tokenizer


def _split(task: str, text: ParallelText) -> Dataset:
    if task == SEQ2SEQ:
        return Dataset.from_dict({"source": list(text.source), "target": list(text.target)})
    if task == CAUSAL:
        return Dataset.from_dict({"text": list(text.source)})
    features = Features({"text": Value("string"), "label": ClassLabel(names=_LABELS)})
    labels = [int(sentence.endswith("?")) for sentence in text.source]
    return Dataset.from_dict({"text": [line.rstrip(".?") for line in text.source], "label": labels}, features=features)
