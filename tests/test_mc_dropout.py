import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tasks.decoding.beam_cache import CACHE, BeamCache
from tasks.decoding.mc_dropout import averaged_over_masks, dropout_on, has_dropout
from tasks.decoding.search import GNMT_RERANK, Decoding, translate
from tasks.decoding.skip_finished import skip_finished
from tiny_models import SEQ2SEQ
from word_tokenizer import copying_model, sentences, word_tokenizer

SOURCES = sentences(5, longest=7)


def sources_batch(texts=SOURCES):
    batch = word_tokenizer()(texts, padding=True, return_tensors="pt")
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def search(model, num_masks, **settings):
    """`generate` under N masks."""
    cache = BeamCache(model.config, num_copies=num_masks)
    with averaged_over_masks(model, num_masks), skip_finished(model):
        return model.generate(
            **sources_batch(), **{CACHE: cache}, return_dict_in_generate=True, output_scores=True, **settings
        )


class KeyedDropout:
    """Stands for `nn.functional.dropout`: the mask is a function of (copy, call in the pass, position) alone.

    So a search that decodes a position at a time, several beams and copies together, and a pass over a whole
    translation of one copy draw the same masks, if both are right about who is which copy.
    """

    def __init__(self, model, num_copies):
        self.num_copies, self.call, self.first_position, self.only_copy = num_copies, 0, 0, None
        for module in (model.get_encoder(), model.get_decoder()):
            module.register_forward_pre_hook(self.start, with_kwargs=True)

    def start(self, module, args, kwargs):
        self.call = 0
        cache = kwargs.get(CACHE)
        self.first_position = 0 if cache is None else cache.get_seq_length()

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        self.call += 1
        copies = range(self.num_copies) if self.only_copy is None else [self.only_copy]
        masks = [self.mask(n, x.shape[1:], p) for n in copies]
        rows = torch.stack(masks).repeat_interleave(len(x) // len(masks), dim=0)
        return x * rows / (1 - p)

    def mask(self, copy, shape, p):
        positions = range(self.first_position, self.first_position + shape[-2])
        seeds = [1_000_003 * copy + 1_009 * self.call + position for position in positions]
        draws = [torch.rand(shape[-1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (torch.stack(draws) >= p).double()


# ---- the law: one search under the mean of N networks


@pytest.mark.parametrize("num_masks", [1, 3])
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_without_dropout_it_is_the_plain_search(family, num_beams, num_masks):
    model, tokenizer = copying_model(family, dropout=0.0).double(), word_tokenizer()
    decodings = [Decoding(num_beams, 0.6, num_masks=n) for n in (0, num_masks)]
    plain, averaged = (
        translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=decoding, max_tokens=16)  # several batches
        for decoding in decodings
    )
    assert averaged == plain
    assert len(set(plain)) > 3


@pytest.mark.parametrize("num_masks", [1, 3])
@pytest.mark.parametrize("family", ["marian", "bart"])
def test_the_search_adds_up_the_mean_over_masks_of_probabilities(family, num_masks, monkeypatch):
    model = copying_model(family, dropout=0.3, attention_dropout=0.0).double()
    keyed = KeyedDropout(model, num_masks)
    monkeypatch.setattr(nn.functional, "dropout", keyed)
    beams, length_penalty = 3, 0.6
    out = search(
        model, num_masks, num_beams=beams, num_return_sequences=beams, length_penalty=length_penalty, max_new_tokens=9
    )
    lengths = (out.beam_indices >= 0).sum(dim=1)
    got = out.sequences_scores * lengths**length_penalty
    want = [
        mean_log_probability(model, keyed, num_masks, source=row // beams, sequence=out.sequences[row, : 1 + length])
        for row, length in enumerate(lengths.tolist())
    ]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-4)
    assert len(set(lengths.tolist())) > 2


@torch.no_grad()
def mean_log_probability(model, keyed, num_masks, source, sequence):
    """The slow twin: one copy after the other, a whole translation in one pass without a cache."""
    batch = {name: x[source : source + 1] for name, x in sources_batch().items()}
    probabilities = []
    for keyed.only_copy in range(num_masks):
        with dropout_on(model):
            logits = model(**batch, decoder_input_ids=sequence[None, :-1], use_cache=False).logits
        probabilities.append(logits[0].softmax(-1).gather(1, sequence[1:, None]))
    keyed.only_copy = None
    return float(torch.stack(probabilities).mean(0).log().sum())


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_more_masks_leave_less_variance(family):
    model, num_repeats = copying_model(family, dropout=0.3), 60
    batch = {name: x[:1].expand(num_repeats, -1) for name, x in sources_batch().items()}

    def variance(num_masks):
        with averaged_over_masks(model, num_masks):
            cache = BeamCache(model.config, num_masks)
            out = model.generate(
                **batch, **{CACHE: cache}, max_new_tokens=1, output_scores=True, return_dict_in_generate=True
            )
        probabilities = out.scores[0].softmax(-1)
        torch.testing.assert_close(out.scores[0].logsumexp(-1), torch.zeros(num_repeats), rtol=0, atol=1e-5)
        return float(probabilities.var(dim=0).sum())

    ratio = variance(16) / variance(1)  # 1/16 in expectation
    assert 1 / 40 < ratio < 1 / 6


def test_re_ranking_works_on_the_averaged_distribution():
    model, tokenizer = copying_model("bart", dropout=0.0).double(), word_tokenizer()
    plain, averaged = (
        translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=Decoding(4, 1.5, GNMT_RERANK, n))
        for n in (0, 2)
    )
    assert averaged == plain


def test_the_masks_follow_the_seed():
    model, tokenizer = copying_model("bart", dropout=0.4), word_tokenizer()

    def translations(seed):
        torch.manual_seed(seed)
        return translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=Decoding(2, 0.6, num_masks=1))

    assert translations(1) == translations(1)
    assert len({tuple(translations(seed)) for seed in range(5)}) > 1


# ---- nothing is left behind


def test_the_model_is_as_before_also_after_an_error():
    model = copying_model("bart")
    model.get_decoder().layers[0].train()  # a mode of its own is kept
    before = {name: module.training for name, module in model.named_modules()}

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def stop():
        with averaged_over_masks(model, 2):
            assert hooks() == 4
            assert all(module.training for module in model.modules())
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert hooks() == 0
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="num_masks must be at least 1, got 0"), averaged_over_masks(model, 0):
        pass


@pytest.mark.trap(34)
def test_layerdrop_stays_off_and_is_put_back():
    plain = copying_model("bart", dropout=0.0).double()
    dropping = copy.deepcopy(plain)
    dropping.get_encoder().layerdrop = dropping.get_decoder().layerdrop = 0.9
    got, want = (search(model, 2, num_beams=2, max_new_tokens=9).sequences for model in (dropping, plain))
    assert torch.equal(got, want)
    assert dropping.get_decoder().layerdrop == 0.9
    assert math.isclose(dropping.get_encoder().layerdrop, 0.9)


@pytest.mark.trap(34)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_model_that_drops_nothing_out_is_known(family):
    dropping, plain = copying_model(family, dropout=0.1), copying_model(family, dropout=0.0)
    state = torch.get_rng_state()
    assert has_dropout(dropping)
    assert not has_dropout(plain)
    assert torch.equal(state, torch.get_rng_state())
