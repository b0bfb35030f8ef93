"""A tokenizer of whole words for the models of `tiny_models` (`w7` is id 7), and models that have learnt to use it."""

import functools
import random
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny_models import FAMILIES, VOCABULARY

# transformers' 0.02 learns slowly at this width
_INIT = {"marian": {"init_std": 0.18, "scale_embedding": True}, "bart": {"init_std": 0.18}}
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def word_tokenizer(*, last_word: str | None = None, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Pad 0, eos 1, unknown 2, words up to the vocabulary of the models; `last_word` is how the last id is written."""
    words = [PAD, EOS, UNK, *(f"w{n}" for n in range(3, VOCABULARY))]
    if last_word is not None:
        words[-1] = last_word
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    more = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        **more,
    )


def sentences(count: int, *, longest: int = 19, seed: int = 0) -> list[str]:
    """Random words; lengths from 1 to `longest`, in no order."""
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(1, longest))) for _ in range(count)
    ]


@functools.cache
def _trained_weights(family: str) -> dict[str, Tensor]:
    """A hundred updates of copying words: enough to stop, mostly, and far from always right."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = FAMILIES[family](dropout=0.1, **_INIT.get(family, {})).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for update in range(100):
            batch = word_tokenizer()(sentences(32, longest=9, seed=update), padding=True, return_tensors="pt")
            labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def copying_model(family: str, dropout: float = 0.1, **more: Any) -> PreTrainedModel:
    """A fresh model of a family that has learnt a little to copy words; in evaluation mode."""
    model = FAMILIES[family](dropout=dropout, **_INIT.get(family, {}), **more)
    model.load_state_dict(_trained_weights(family))
    return model.eval()
