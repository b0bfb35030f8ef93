"""Text for language modelling: splits, vocabularies, streams and windows."""

import gzip
import itertools
import lzma
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from tasks.cli.errors import DataError
from tasks.language_modelling.prepare import load_corpus
from tasks.language_modelling.text import generated_splits, read_split
from tasks.language_modelling.vocabulary import build_vocabulary, count_unknown, encode_lines
from tasks.language_modelling.windows import Streams, WindowSampler
from tasks.run.stream import SAMPLE_IDS, BatchStream

DATA = os.environ.get("SEQBA_DATA")
TEXT = {"train": [" a dog sleeps", "", "a <unk> a"], "valid": ["a dog"], "test": ["sleeps \x85a"]}


def write(folder, pattern="{}.txt", text=TEXT, end="\n", opener=open):
    folder.mkdir(exist_ok=True)
    for split, lines in text.items():
        with opener(folder / pattern.format(split), "wb") as file:
            file.write("".join(line + end for line in lines).encode())
    return str(folder)


@pytest.mark.trap(40)
@pytest.mark.trap(45)
@pytest.mark.parametrize(
    ("pattern", "opener"),
    [("ptb.{}.txt", open), ("{}.txt.gz", gzip.open), ("wiki.{}.tokens.xz", lzma.open), ("wiki.{}.tokens", open)],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_folder_of_text_files_gives_its_lines_however_they_are_named_and_packed(pattern, opener, end, tmp_path):
    source = write(tmp_path / "data", pattern, end=end, opener=opener)
    assert {split: read_split(source, split) for split in TEXT} == TEXT


@pytest.mark.parametrize(("valid", "column"), [("validation", "sentence"), ("valid", "text")])
def test_a_saved_data_set_gives_the_same_lines(valid, column, tmp_path):
    rows = {"train": "train", valid: "valid", "test": "test"}
    made = {name: datasets.Dataset.from_dict({column: [x + "\n" for x in TEXT[of]]}) for name, of in rows.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    assert {split: read_split(str(tmp_path / "saved"), split) for split in TEXT} == TEXT


def test_a_split_that_is_missing_twice_there_or_no_folder_is_refused(tmp_path):
    source = Path(write(tmp_path / "data"))
    with pytest.raises(DataError, match=r"train\.txt is a file; give the folder"):
        read_split(str(source / "train.txt"), "train")
    (source / "ptb.test.txt").write_text("a\n")
    with pytest.raises(
        DataError, match=r"several files hold the split 'test', keep one: .*ptb\.test\.txt, .*test\.txt"
    ):
        read_split(str(source), "test")
    (source / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"has no split 'valid': looked for ptb\.valid\.txt.*wiki\.valid\.tokens\.xz"):
        read_split(str(source), "valid")
    with pytest.raises(DataError, match="cannot load"):
        read_split(str(tmp_path / "nothing"), "train")
    (source / "train.txt").write_bytes(b"a dog\n\xff\n")
    with pytest.raises(DataError, match=r"train\.txt, line 2: not valid UTF-8"):
        read_split(str(source), "train")
    (source / "train.txt").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        read_split(str(source), "train")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"words": ["a"]})}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="has the columns words; a text needs one called text or sentence"):
        read_split(str(tmp_path / "saved"), "train")
    with pytest.raises(DataError, match="has the splits train, and none for 'test'"):
        read_split(str(tmp_path / "saved"), "test")


def test_the_generated_text_is_english_and_every_word_of_it_is_trained_on():
    splits = generated_splits(0)
    assert len(splits["train"]) > len(splits["valid"]) == len(splits["test"])
    assert not set(splits["test"]) & set(splits["train"])
    assert count_unknown(splits["test"] + splits["valid"], build_vocabulary(splits["train"])) == 0


# ---- vocabulary


def test_words_are_what_white_space_separates_and_every_line_ends_with_eos():
    tokenizer = build_vocabulary(TEXT["train"])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == ["<eos>", "<unk>", "a", "dog", "sleeps"]
    ids = encode_lines([*TEXT["train"], "a cat", "<unk>"], tokenizer, "text")
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["a", "dog", "sleeps", "<eos>", "<eos>", "a", "<unk>", "a", "<eos>", "a", "<unk>", "<eos>", "<unk>", "<eos>"]
    )
    assert count_unknown(["a cat <unk> mouse cat"], tokenizer) == 3


def test_a_vocabulary_of_a_size_keeps_the_most_frequent_words_and_reads_the_others_as_unknown():
    lines = ["e d c b a", "d c b a", "c b a a"]
    tokenizer = build_vocabulary(lines, vocab_size=5)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<eos>", "<unk>", "a", "b", "c"]
    assert encode_lines(["e a"], tokenizer, "text").tolist() == [1, 2, 0]
    assert build_vocabulary(lines, vocab_size=6).unk_token is None  # every word has its place
    assert len(build_vocabulary([*lines, "<unk>"], vocab_size=6)) == 6
    with pytest.raises(DataError, match=r"vocab_size must be at least 3.*got 2"):
        build_vocabulary(lines, vocab_size=2)


def test_text_that_a_vocabulary_cannot_say_is_refused_with_its_line():
    tokenizer = build_vocabulary(["a dog"])
    with pytest.raises(
        DataError, match=r"test, line 2: 'cat' is not among the 3 words .* has no <unk>; .*--vocab-size"
    ):
        encode_lines(["a dog", "a cat"], tokenizer, "test")
    for word in ("<eos>", "a<eos>", "-<unk>"):
        with pytest.raises(
            DataError, match=f"test, line 2 holds '{word}': <eos> is added to every line, and <unk> is a"
        ):
            encode_lines(["a dog", f"a {word}"], tokenizer, "test")


def test_white_space_is_the_same_to_the_tokenizer_and_to_the_vocabulary():
    tokenizer = build_vocabulary(["<unk> a b"])
    odd = [chr(code) for code in range(0x3100) if len(f"a{chr(code)}b".split()) == 2]
    assert {"\x85", "\x1c"} <= set(odd)
    for space in odd:
        assert tokenizer.convert_ids_to_tokens(encode_lines([f"a{space}b"], tokenizer, "text")) == ["a", "b", "<eos>"]
    joined = [chr(code) for code in range(33, 0x3100) if len(f"a{chr(code)}b".split()) == 1]
    assert all(encode_lines([f"a{mark}b"], tokenizer, "text").tolist() == [1, 0] for mark in joined)


def test_equal_counts_do_not_depend_on_the_order_of_lines():
    assert build_vocabulary(["b a", "c"]).get_vocab() == build_vocabulary(["c", "b a"]).get_vocab()


@pytest.mark.skipif(DATA is None, reason="SEQBA_DATA names no folder with Penn Treebank and WikiText-2")
@pytest.mark.trap(40)
@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [("ptb", (929_589, 73_760, 82_430), 10_000), ("wikitext2", (2_088_628, 217_646, 245_569), 33_278)],
)
def test_real_texts_have_the_tokens_and_words_of_the_literature(name, tokens, words):
    corpus = load_corpus(str(Path(DATA, name)))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == tokens
    assert len(corpus.tokenizer) == words
    lines = read_split(str(Path(DATA, name)), "test")
    ids = corpus.tokenizer.get_vocab()
    slow = [ids[word] for line in lines for word in [*line.split(), "<eos>"]]
    assert corpus.test.tolist() == slow


def test_what_a_text_holds_is_said_and_its_content_named(tmp_path, caplog):
    source = write(tmp_path / "data", text=TEXT | {"test": ["a cat", "cat"]})
    with caplog.at_level("INFO", "tasks"):
        corpus = load_corpus(source)
    assert "train text: 3 lines, 9 tokens with an <eos> each; 1 lines empty but for it" in caplog.text
    assert "test text: 2 lines, 5 tokens with an <eos> each; 2 words outside of the vocabulary, read as <unk>" in (
        caplog.text
    )
    assert load_corpus(write(tmp_path / "same", "ptb.{}.txt")).fingerprint == corpus.fingerprint
    other = load_corpus(write(tmp_path / "other", text=TEXT | {"valid": ["dog a"]}))
    assert other.fingerprint != corpus.fingerprint


# ---- streams and windows


def test_streams_are_stretches_of_the_text_one_after_the_other():
    streams = Streams(np.arange(47, dtype=np.int32), batch_size=3, num_groups=2)
    assert (streams.length, streams.left_out, len(streams)) == (6, 5, 12)
    batch = streams.collate(streams.__getitems__([7, 8, 9]))  # group 1, time steps 1 to 3
    assert batch["input_ids"].tolist() == [[22, 23, 24], [29, 30, 31], [36, 37, 38]]
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert batch["labels"].dtype == torch.int64
    with pytest.raises(DataError, match=r"has 47 tokens, too few for 24 streams of at least 2 \(--batch-size 8"):
        Streams(np.arange(47), batch_size=8, num_groups=3)


def windows_of(sampler, epochs=1):
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_windows_follow_one_another_and_every_epoch_cuts_anew():
    sampler = WindowSampler(5_000, 70, seed=3)
    epochs = windows_of(sampler, 3)
    for windows in epochs:
        assert list(itertools.chain(*windows)) == list(range(5_000))
    assert len({str(windows) for windows in epochs}) == 3
    assert windows_of(WindowSampler(5_000, 70, seed=4)) != epochs[:1]
    sampler.set_epoch(2)
    assert len(sampler) == len(epochs[2])


def test_lengths_are_normal_around_bptt_and_around_half_of_it_one_time_in_twenty_and_never_below_five():
    lengths = np.array([len(w) for w in windows_of(WindowSampler(700_000, 70, seed=0))[0][:-1]])
    halved = lengths < 53
    assert 0.04 < halved.mean() < 0.06
    assert abs(lengths[~halved].mean() - 69.5) < 0.3  # rounded down
    assert abs(lengths[halved].mean() - 34.5) < 1
    assert abs(lengths[~halved].std() - 5) < 0.2
    short = Counter(len(w) for w in windows_of(WindowSampler(20_000, 6, seed=0))[0][:-1])
    assert min(short) == 5
    assert short[5] > short[6]


@pytest.mark.trap(21)
def test_every_shard_and_accumulated_batch_reads_the_same_windows_of_its_own_streams():
    one = WindowSampler(300, 20, seed=1, batches_per_update=4)
    whole = list(one)
    for shard in range(2):
        sampler = WindowSampler(300, 20, seed=1, num_shards=2, shard=shard, batches_per_update=2)
        want = [batch for i, batch in enumerate(whole) if i % 4 // 2 == shard]
        assert list(sampler) == want
    assert [batch[0] // 300 for batch in whole[:4]] == [0, 1, 2, 3]
    assert len({tuple(step % 300 for step in batch) for batch in whole[:4]}) == 1


@pytest.mark.trap(24)
@pytest.mark.parametrize("taken", [3, 16, 17])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_of_windows_goes_on_where_its_position_was_saved(taken, num_workers):
    def make(workers=0):
        streams = Streams(np.arange(601), batch_size=2)
        sampler = WindowSampler(streams.length, 20, seed=1)
        return BatchStream(streams, sampler, streams.collate, device=torch.device("cpu"), seed=1, num_workers=workers)

    straight, first = make(), make()
    want = [straight.take(1)[0] for _ in range(40)]
    assert len(straight.sampler) <= 17
    for _ in range(taken):
        first.take(1)
    resumed = make(num_workers)
    resumed.load_state_dict(first.state_dict())
    for batch in want[taken:]:
        found = resumed.take(1)[0]
        assert all(torch.equal(found[name], batch[name]) for name in ("input_ids", "labels", SAMPLE_IDS))


def test_a_position_of_other_windows_is_refused():
    state = WindowSampler(300, 20, seed=1).state_dict(2)
    with pytest.raises(ValueError, match=r"its windows were .*'bptt': 20.* and are .*'bptt': 30"):
        WindowSampler(300, 30, seed=1).load_state_dict(state)


def test_the_folder_above_the_splits_is_not_read_for_one_text(tmp_path):
    write(tmp_path / "ptb")
    write(tmp_path / "other", "wiki.{}.tokens")
    with pytest.raises(DataError, match=r"holds no split itself; give .*/other or .*/ptb"):
        read_split(str(tmp_path), "train")


@pytest.mark.parametrize("lines", [["", " "], ["\u200b", "\u200b\ufeff"]])
def test_a_text_without_a_word_is_refused(lines):
    with pytest.raises(DataError, match="the training text has no word"):
        build_vocabulary(lines)


def test_lines_that_end_in_carriage_returns_alone_are_refused(tmp_path):
    folder = write(tmp_path / "mac", end="\r")
    with pytest.raises(DataError, match=r"train\.txt: its lines end in carriage returns alone"):
        read_split(folder, "train")


def test_a_column_of_numbers_is_no_text(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [1, 2]})}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match="the column 'text' holds no text but"):
        read_split(str(tmp_path / "numbers"), "train")


def test_packed_splits_that_are_not_read_are_named_with_the_remedy(tmp_path):
    (tmp_path / "valid.txt.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"valid\.txt\.zst is not read; unpack it"):
        read_split(str(tmp_path), "valid")
