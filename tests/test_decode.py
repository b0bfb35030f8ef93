import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from tasks.decoding import search as decode
from tasks.decoding.beam_cache import CACHE, BeamCache
from tasks.decoding.search import (
    GNMT_RERANK,
    Decoding,
    count_truncated,
    describe_other_settings,
    encode_sources,
    max_source_length,
    rerank,
    translate,
)
from tasks.decoding.skip_finished import skip_finished
from tasks.text.generated.corpus import generate_corpus
from tasks.text.tokenizer import load_tokenizer, train_tokenizer
from tiny_models import SEQ2SEQ, marian
from word_tokenizer import copying_model, sentences, word_tokenizer

SOURCES = sentences(14, longest=12)


def batch_of(tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def most_new_tokens(source_length, positions=None):
    """Twice the source, rounded up to whole eights, and 20; one position is the start token's."""
    return min(2 * math.ceil(source_length / 8) * 8 + 20, math.inf if positions is None else positions - 1)


def generate_alone(model, tokenizer, text, **settings):
    """transformers' own search with its own cache, of one sentence without padding."""
    batch = batch_of(tokenizer, [text])
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = most_new_tokens(batch["input_ids"].shape[1], positions)
    return batch, model.generate(**batch, max_new_tokens=limit, **settings)


def log_probability(model, batch, sequence):
    """Nats of one translation by a full forward pass without a cache: (1, T) with its start token, unpadded."""
    logits = model(**batch, decoder_input_ids=sequence[:, :-1], use_cache=False).logits.log_softmax(-1)
    return float(logits.gather(2, sequence[:, 1:, None]).sum())


def without_padding(sequence, eos=1):
    """Up to the first eos after the start token."""
    ids = sequence.tolist()
    return sequence[: 1 + next((i for i, token in enumerate(ids[1:], start=1) if token == eos), len(ids) - 1)]


# ---- the search is transformers', whatever the batch


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_translations_are_those_of_generate_one_sentence_at_a_time(family, num_beams):
    model, tokenizer = copying_model(family).double(), word_tokenizer()
    got = translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=Decoding(num_beams, 0.6), max_tokens=64)
    penalty = {"length_penalty": 0.6} if num_beams > 1 else {}
    for source, translation in zip(SOURCES, got, strict=True):
        _, alone = generate_alone(model, tokenizer, source, num_beams=num_beams, **penalty)
        assert translation == tokenizer.decode(alone[0], skip_special_tokens=True)
    assert len(set(got)) > 9  # sentences differ, so that a wrong order shows
    assert len({len(translation.split()) for translation in got}) > 3


@pytest.mark.parametrize("max_tokens", [1, 100_000])
@pytest.mark.parametrize("settings", [{}, {"forced_eos_token_id": 1}, {"early_stopping": "never"}])
def test_the_size_of_a_batch_changes_no_translation(max_tokens, settings):
    # a forced eos and early_stopping="never" read the most pieces allowed, which must therefore be the sentence's own
    model, tokenizer = copying_model("bart").double(), word_tokenizer()
    model.generation_config.update(**settings)
    got = [
        translate(Accelerator(cpu=True), model, tokenizer, SOURCES[:8], decoding=Decoding(3, 1.3), max_tokens=tokens)
        for tokens in (30, max_tokens)
    ]
    assert got[0] == got[1]


def test_a_model_that_never_stops_is_stopped_by_its_source():
    model, tokenizer = copying_model("t5"), word_tokenizer()
    model.generation_config.update(suppress_tokens=[1])
    got = translate(Accelerator(cpu=True), model, tokenizer, ["w5 w6", " ".join(["w7"] * 9)], decoding=Decoding(2, 0.6))
    assert [len(text.split()) for text in got] == [most_new_tokens(3), most_new_tokens(10)]


def test_the_models_own_settings_hold_where_no_decoding_is_given():
    model, tokenizer = copying_model("marian"), word_tokenizer()
    model.generation_config.update(num_beams=3, length_penalty=2.0, max_length=7)
    own = translate(Accelerator(cpu=True), model, tokenizer, SOURCES)
    assert own == translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=Decoding(3, 2.0))
    assert own != translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=Decoding(1))


@pytest.mark.trap(36)
@pytest.mark.parametrize("decoding", [Decoding(1), Decoding(3, 0.6), Decoding(3, 0.6, GNMT_RERANK)])
def test_a_model_that_samples_by_default_is_searched_all_the_same(decoding):
    model, tokenizer = copying_model("bart"), word_tokenizer()
    want = translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=decoding)
    model.generation_config.update(do_sample=True, temperature=5.0)
    state = torch.get_rng_state()
    assert translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=decoding) == want
    assert torch.equal(state, torch.get_rng_state())


def test_batches_hold_every_sentence_once_within_both_budgets_and_with_one_limit():
    lengths = [3, 17, 8, 9, 1, 16, 8, 25, 2, 9, 9, 9, 30]
    ids = [[7] * length for length in lengths]
    limits = [most_new_tokens(length) for length in lengths]
    for max_tokens, max_scores in ((20, None), (1_000, None), (1_000, 90), (1, 1)):
        batches = list(decode._batches_by_length(range(len(ids)), ids, limits, max_tokens, max_scores))
        assert sorted(itertools.chain(*batches)) == list(range(len(ids)))
        for batch in batches:
            assert len({limits[n] for n in batch}) == 1
            longest = max(lengths[n] for n in batch)
            assert len(batch) == 1 or len(batch) * longest <= max_tokens
            assert len(batch) == 1 or max_scores is None or len(batch) * limits[batch[0]] <= max_scores


def test_rows_of_a_copy_follow_their_beams_and_the_sources_stay():
    cache = BeamCache(marian().config, num_copies=2)
    row = torch.arange(6.0).view(6, 1, 1, 1)  # copy-major: copy 0 of beams 0 1 2, copy 1 of beams 0 1 2
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        part.update(row, 10 + row, 0)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    assert cache.self_attention_cache.layers[0].keys.flatten().tolist() == [2, 0, 2, 5, 3, 5]
    assert cache.self_attention_cache.layers[0].values.flatten().tolist() == [12, 10, 12, 15, 13, 15]
    assert torch.equal(cache.cross_attention_cache.layers[0].keys, row)


# ---- settled sentences leave the batch


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_a_search_without_settled_sentences_finds_the_same_beams(family, early_stopping):
    model, rows = copying_model(family).double(), []
    model.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    model.get_decoder().register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    settings = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.6, "max_new_tokens": 30,
                "early_stopping": early_stopping, "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    batch = batch_of(word_tokenizer(), SOURCES)
    plain = model.generate(**batch, **settings)
    plain_rows = sum(rows[::2])
    rows.clear()
    with skip_finished(model):
        for _ in range(2):  # a second search starts anew
            rows.clear()
            got = model.generate(**batch, **settings, **{CACHE: BeamCache(model.config)})
    assert torch.equal(got.sequences, plain.sequences)
    torch.testing.assert_close(got.sequences_scores, plain.sequences_scores, rtol=1e-5, atol=1e-5)
    assert sum(rows[::2]) <= plain_rows
    if early_stopping is False:
        assert sum(rows[::2]) < 0.8 * plain_rows


def test_the_model_is_searched_as_before_once_it_is_left():
    model = copying_model("bart")
    before = dict(vars(model))
    with skip_finished(model):
        assert vars(model).keys() != before.keys()
    assert vars(model).keys() == before.keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_cache_that_has_dropped_beams_still_counts_them_as_the_search_does():
    cache = BeamCache(marian().config, num_copies=2)
    row = torch.arange(12.0).view(12, 1, 1, 1)  # copy-major: 6 beams of 3 sentences, twice
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        part.update(row, 100 + row, 0)

    def rows(part):
        return part.layers[0].keys.flatten().tolist()

    cache.keep(torch.tensor([2, 3, 4, 5]))
    assert rows(cache.self_attention_cache) == rows(cache.cross_attention_cache) == [2, 3, 4, 5, 8, 9, 10, 11]
    cache.reorder_cache(torch.tensor([1, 1, 3, 2, 5, 5]))
    assert rows(cache.self_attention_cache) == [3, 2, 5, 5, 9, 8, 11, 11]
    cache.keep(torch.tensor([4, 5]))
    assert rows(cache.self_attention_cache) == [5, 5, 11, 11]
    assert rows(cache.cross_attention_cache) == [4, 5, 10, 11]
    cache.reorder_cache(torch.tensor([0, 0, 2, 2, 5, 4]))
    assert cache.self_attention_cache.layers[0].values.flatten().tolist() == [105, 105, 111, 111]


# ---- length penalties


@pytest.mark.trap(36)
@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_gnmt_rerank_takes_the_finished_beam_that_its_formula_ranks_first(family):
    model, tokenizer, alpha, beams = copying_model(family).double(), word_tokenizer(), 1.0, 4
    decoding = Decoding(beams, alpha, GNMT_RERANK)
    got = translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=decoding, max_tokens=64)
    num_changed = 0
    for source, translation in zip(SOURCES, got, strict=True):
        batch, finished = generate_alone(
            model, tokenizer, source, num_beams=beams, length_penalty=alpha, num_return_sequences=beams
        )
        candidates = [without_padding(sequence) for sequence in finished]
        scores = [
            log_probability(model, batch, candidate[None]) / ((5 + len(candidate) - 1) / 6) ** alpha
            for candidate in candidates
        ]
        best = max(range(beams), key=scores.__getitem__)
        assert translation == tokenizer.decode(candidates[best], skip_special_tokens=True)
        num_changed += best != 0
    assert num_changed > 0  # somewhere the two formulas disagree


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
@torch.no_grad()
def test_re_ranking_gets_the_log_probabilities_of_a_full_forward_pass(length_penalty, monkeypatch):
    model, tokenizer, seen = copying_model("bart").double(), word_tokenizer(), []
    monkeypatch.setattr(decode, "rerank", lambda *args: seen.append(args) or rerank(*args))
    for source in SOURCES[:6]:
        translate(Accelerator(cpu=True), model, tokenizer, [source], decoding=Decoding(3, length_penalty, GNMT_RERANK))
        sequences, log_probabilities, lengths, _ = seen.pop()
        candidates = [without_padding(sequence) for sequence in sequences]
        assert lengths.tolist() == [len(candidate) - 1 for candidate in candidates]
        want = [log_probability(model, batch_of(tokenizer, [source]), candidate[None]) for candidate in candidates]
        torch.testing.assert_close(log_probabilities, torch.tensor(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("longer", "alpha", "best"),  # 7 pieces at `longer` nats against 1 piece at -3: (5 + 7) / 6 is 2, (5 + 1) / 6 is 1
    [(-5.8, 1.0, 0), (-6.2, 1.0, 1), (-4.1, 0.5, 0), (-4.4, 0.5, 1), (-2.9, 0.0, 0), (-3.1, 0.0, 1)],
)
def test_re_ranking_by_hand(longer, alpha, best):
    sequences, sums, lengths = torch.tensor([[1, 2], [3, 4]]), torch.tensor([longer, -3.0]), torch.tensor([7, 1])
    assert rerank(sequences, sums, lengths, Decoding(2, alpha, GNMT_RERANK)).tolist() == sequences[[best]].tolist()


def test_the_scores_that_re_ranking_keeps_are_bounded(monkeypatch):
    model, tokenizer, rows = copying_model("marian"), word_tokenizer(), []
    monkeypatch.setattr(decode, "_MAX_SCORES", 4 * 61 * 120)  # three sentences of at most 36 pieces
    generate = model.generate
    model.generate = lambda **settings: rows.append(len(settings["input_ids"])) or generate(**settings)
    rerank_by_gnmt = Decoding(4, 0.6, GNMT_RERANK)
    few = translate(Accelerator(cpu=True), model, tokenizer, SOURCES, decoding=rerank_by_gnmt)
    assert max(rows) == 3
    monkeypatch.undo()
    assert few == translate(Accelerator(cpu=True), copying_model("marian"), tokenizer, SOURCES, decoding=rerank_by_gnmt)


@pytest.mark.trap(36)
@pytest.mark.parametrize(
    ("decoding", "said"),
    [
        (Decoding(1, 0.6), "greedy, no length penalty"),
        (Decoding(4, 0.6), "beam 4, log-probability / L^0.6"),
        (
            Decoding(5, 1.0, GNMT_RERANK),
            "beam 5 by log-probability / L^1.0, its finished beams re-ranked by log-probability / ((5+L)/6)^1.0",
        ),
        (Decoding(2, 0.0, num_masks=8), "beam 2, log-probability / L^0.0, mean of 8 dropout masks' probabilities"),
    ],
)
def test_a_decoding_says_its_beam_and_its_formula(decoding, said):
    assert str(decoding) == said


def test_other_settings_that_change_the_search_are_said():
    settings = GenerationConfig(no_repeat_ngram_size=3, early_stopping=True, num_beams=4, eos_token_id=1)
    assert describe_other_settings(settings) == "early_stopping True, no_repeat_ngram_size 3"
    assert describe_other_settings(GenerationConfig(num_beams=2, max_length=9)) == ""


# ---- what the encoder is given


@pytest.fixture(scope="module")
def marian_tokenizer(tmp_path_factory):
    text = generate_corpus(train=300, valid=5, test=40)
    return load_tokenizer(train_tokenizer(text["train"], 500, tmp_path_factory.mktemp("cache"))), text["test"].source


def test_sources_get_the_tokenizers_ids_cut_as_it_cuts(marian_tokenizer):
    tokenizer, sources = marian_tokenizer
    sources = [*sources, "", " ", "\u4f60"]
    for positions in (64, 9):
        model = marian(max_position_embeddings=positions)
        want = [tokenizer(text, truncation=True, max_length=positions).input_ids for text in sources]
        assert encode_sources(model, tokenizer, sources) == want
        too_long = sum(len(tokenizer(text).input_ids) > positions for text in sources)
        assert count_truncated(model, tokenizer, sources) == too_long
    assert too_long > 3


def test_a_model_without_positions_is_limited_by_its_tokenizer_or_not_at_all():
    model = copying_model("t5")
    assert max_source_length(model, word_tokenizer()) is None
    assert count_truncated(model, word_tokenizer(), SOURCES) == 0
    short = word_tokenizer(max_length=6)
    assert max_source_length(model, short) == 6
    assert max(map(len, encode_sources(model, short, SOURCES))) == 6
    assert count_truncated(model, short, SOURCES) == sum(len(text.split()) > 5 for text in SOURCES) > 3
