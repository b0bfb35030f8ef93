"""A stream of batches: the randomness of its samples is neither of workers nor of where a run was resumed."""

from __future__ import annotations

import io
import random
from functools import partial

import numpy as np
import pytest
import sentencepiece
import torch

from checkpoints import assert_bitwise
from seqba import FixedBatchSampler, rng_state
from tasks.run.stream import SAMPLE_IDS, BatchStream

NUM_SAMPLES, NUM_COPIES, BATCH = 11, 3, 2  # 5 batches an epoch, one sample left out
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "wizards", "quietly", "under", "lanterns"]


def noise(sample, key):
    """M copies of a sample, (M, 3): what torch, Python and numpy draw for it."""
    rows = []
    for copy in range(NUM_COPIES):
        with key.generators(copy):
            rows.append([torch.rand(()).item(), random.random(), np.random.rand()])
    return torch.tensor(rows, dtype=torch.float64)


def numpy_noise(sample, key):
    with key.generators(0):
        return torch.from_numpy(np.random.rand(1, 2))


def segments(processor, sample, key):
    """Each word's pieces, drawn from its best: SentencePiece's own draws under one seed differ between processes."""
    with key.generators(0):
        words = [processor.nbest_encode(word, out_type=str, nbest_size=64) for word in sample.split()]
        return [piece for best in words for piece in random.choice(best)]


def stacked(samples):
    return {"x": torch.stack(samples, dim=1)}  # (M, B, ...)


def listed(samples):
    """Pieces as rows of bytes, which are tensors."""
    rows = [" ".join(pieces).encode() for pieces in samples]
    return {"x": torch.tensor([list(row.ljust(900)) for row in rows])[None]}


def stream_of(transform=noise, *, data=range(NUM_SAMPLES), num_workers=0, seed=4, collate=stacked):
    sampler = FixedBatchSampler(NUM_SAMPLES, BATCH, seed=1)
    options = {"device": torch.device("cpu"), "seed": seed, "num_workers": num_workers, "transform": transform}
    return BatchStream(data, sampler, collate, **options)


def of_samples(stream, num_epochs):
    """(epoch, sample) -> its copies, (M, ...)."""
    return {
        (epoch, sample): batch["x"][:, row]
        for epoch in range(num_epochs)
        for batch in stream.take(len(stream.sampler))
        for row, sample in enumerate(batch[SAMPLE_IDS].tolist())
    }


@pytest.fixture(scope="module")
def two_epochs():
    return stream_of().take(10)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 2, 7])
def test_workers_and_a_resume_give_the_same_bits(two_epochs, num_workers, start):
    stream, resumed = stream_of(num_workers=num_workers), stream_of(num_workers=num_workers)
    before = rng_state()
    assert_bitwise(stream.take(start), two_epochs[:start])
    resumed.load_state_dict(stream.state_dict())
    assert_bitwise(resumed.take(10 - start), two_epochs[start:])
    assert_bitwise(rng_state(), before)


def test_every_copy_of_every_sample_in_every_epoch_of_every_seed_is_transformed_anew():
    copies = [x for seed in (4, 5) for x in of_samples(stream_of(seed=seed), 2).values()]  # 2 * 20 of (M, 3)
    drawn = torch.cat(copies)
    assert [len(column.unique()) for column in drawn.T] == [2 * 20 * NUM_COPIES] * 3


@pytest.mark.trap(29)
def test_numpy_in_workers_draws_anew_for_every_sample_and_epoch():
    np.random.seed(0)
    np.random.rand()  # what forked workers inherit
    drawn = of_samples(stream_of(numpy_noise, num_workers=2), 2)
    assert len({str(x.tolist()) for x in drawn.values()}) == len(drawn) == 20


@pytest.mark.trap(28)
def test_segmentations_in_workers_are_drawn_anew_for_every_sample_and_epoch():
    text, model = random.Random(1), io.BytesIO()
    lines = [" ".join(text.choices(WORDS, k=9)) for _ in range(500)]
    options = {"vocab_size": 40, "model_type": "unigram", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    processor.encode(lines[0], enable_sampling=True, alpha=0.1, nbest_size=-1)  # what forked workers inherit

    def drawn(num_workers):
        options = {"data": [" ".join(lines[:3])] * NUM_SAMPLES, "num_workers": num_workers, "collate": listed}
        return of_samples(stream_of(partial(segments, processor), **options), 2)

    two = drawn(2)
    assert len({str(x.tolist()) for x in two.values()}) == len(two) == 20
    assert_bitwise(two, drawn(0))


def test_a_stream_says_how_long_its_batches_were_waited_for(monkeypatch):
    stream = stream_of()
    stream.take(1)
    now = iter([10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr(stream, "seconds_waited", 0.0)
    stream.take(3)
    stream.take(2)
    assert (stream.batches_taken, stream.seconds_waited) == (6, 2.5)
