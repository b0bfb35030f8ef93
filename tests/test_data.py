import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import datasets
import pytest
import sentencepiece
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, MarianTokenizer

from seqba import repeat_batch
from tasks.text.encoding import LineEncoder
from tasks.text.parallel import DROP_REASONS, DataError, ParallelText, read_lines, read_parallel
from tasks.text.tokenizer import load_tokenizer, train_tokenizer
from tasks.translation import data as data_module
from tasks.translation.data import IGNORE_INDEX, LengthLimit, TranslationCollator, encode_pairs, lengths

DATA = Path(os.environ.get("SEQBA_DATA", ""))
needs_data = pytest.mark.skipif("SEQBA_DATA" not in os.environ, reason="SEQBA_DATA names no folder of corpora")

WORDS = ["dog", "cat", "house", "tree", "river", "mountain", "child", "teacher", "window", "garden"]
WÖRTER = ["Hund", "Katze", "Haus", "Baum", "Fluß", "Berg", "Kind", "Lehrer", "Fenster", "Gärten"]
TEXT = ParallelText(
    [f"the {a} sees the {b} ." for a in WORDS for b in WORDS],
    [f"{a} {'sieht heute ' * (n % 5)}{b} ." for n, a in enumerate(WÖRTER) for b in WÖRTER],
)
FRAGMENTS = (
    *("<pad>", "</s>", "<unk>", ">>de<<", ">>", "<<", "<0x41>", "</", " ", "  ", "\t", "\n", "\x85", "\u2028", "\0"),
    *("a", "dog", "Hund", "é", "e\u0301", "ﬁ", "…", "🙂", "漢", "\u2581", "\u2585", "\ufeff", "\u200b", "\u3000"),
)


def odd_lines(count):
    """Every fragment alone, and random chains of them."""
    draw = random.Random(3)
    chains = ["".join(draw.choices(FRAGMENTS, k=draw.randrange(2, 7))) for _ in range(count)]
    return ["", *FRAGMENTS, *chains]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_tokenizer(TEXT, 340, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def encoded(tokenizer, tmp_path_factory):
    return encode_pairs(TEXT, tokenizer, cache_dir=tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
        ("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads"), 4
    )
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = MarianConfig(
        vocab_size=len(tokenizer),
        pad_token_id=pad,
        eos_token_id=eos,
        forced_eos_token_id=eos,
        decoder_start_token_id=pad,
        **sizes,
    )
    return MarianMTModel(config)


@pytest.fixture(scope="module")
def shuffled_vocabulary(tmp_path_factory):
    """As the OPUS-MT tokenizers are: vocab.json in its own order, with holes, and characters no piece has."""
    folder = tmp_path_factory.mktemp("opus")
    options = {"model_type": "bpe", "vocab_size": 60, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.source), model_prefix=str(folder / "m"), **options
    )
    shutil.copy(folder / "m.model", folder / "source.spm")
    shutil.copy(folder / "m.model", folder / "target.spm")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    pieces = ["<pad>", "</s>", *(model.id_to_piece(i) for i in range(5, 60)), "<unk>", "é", ">>de<<"]
    random.Random(0).shuffle(pieces)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    return load_tokenizer(folder)


@pytest.mark.parametrize("is_target", [False, True])
@pytest.mark.parametrize("which", ["tokenizer", "shuffled_vocabulary", "with_added_token"])
def test_ids_are_those_of_the_tokenizer_on_odd_lines(request, which, is_target, tokenizer, tmp_path):
    if which == "with_added_token":
        tokenizer.save_pretrained(tmp_path)
        chosen = load_tokenizer(tmp_path)
        chosen.add_tokens(["Hund", "▁dog"])
    else:
        chosen = request.getfixturevalue(which)
    lines = odd_lines(400)
    processor = chosen.spm_target if is_target else chosen.spm_source

    def as_text(line):  # what looks like a language code is text, since the vocabulary has no such code
        if line.startswith(">>") and ">>de<<" not in chosen.get_vocab():
            return [*chosen.convert_tokens_to_ids(processor.encode(line, out_type=str)), chosen.eos_token_id]
        return chosen(**{"text_target" if is_target else "text": line}, split_special_tokens=True)["input_ids"]

    encode = LineEncoder(chosen, is_target=is_target)
    assert encode(lines) == [as_text(line) for line in lines]
    marked = ["a </s> dog", "<pad>", "<pad> dog", ">>fr<< a dog", ">>dog"]
    for line, ids in zip(marked, encode(marked), strict=True):
        assert not set(ids[:-1]) & {chosen.pad_token_id, chosen.eos_token_id}, line
        assert which == "shuffled_vocabulary" or chosen.decode(ids, skip_special_tokens=True) == line
    assert encode(TEXT.source) == chosen(TEXT.source)["input_ids"]  # a chunk with nothing odd in it


def test_columns_are_what_the_tokenizer_gives_for_source_and_target(encoded, tokenizer):
    dataset, counts = encoded
    wanted = tokenizer(TEXT.source, text_target=TEXT.target)
    assert dataset["input_ids"][:] == wanted["input_ids"]
    assert dataset["labels"][:] == wanted["labels"]
    assert counts == {"empty": 0, "too_long": 0, "length_ratio": 0}


def test_length_is_the_longer_side_with_eos(encoded):
    dataset, _ = encoded
    longer = [max(len(row["input_ids"]), len(row["labels"])) for row in dataset]
    assert dataset["length"][:] == longer
    assert lengths(dataset).tolist() == longer
    assert lengths(dataset.select([7, 3])).tolist() == [longer[7], longer[3]]


@pytest.mark.parametrize(("chunk", "num_proc"), [(7, 1), (100, 3), (7, 2)])
def test_chunks_and_threads_do_not_change_the_result(encoded, tokenizer, tmp_path, monkeypatch, chunk, num_proc):
    monkeypatch.setattr(data_module, "_CHUNK", chunk)
    dataset, _ = encode_pairs(TEXT, tokenizer, cache_dir=tmp_path, num_proc=num_proc)
    assert dataset[:] == encoded[0][:]


def test_the_data_set_lives_in_a_file(encoded):
    dataset, _ = encoded
    (file,) = dataset.cache_files
    assert Path(file["filename"]).is_file()


def test_equal_text_tokenizer_and_limit_are_not_encoded_again(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    first, counts = encode_pairs(TEXT, tokenizer, cache_dir=tmp_path / "pairs", max_length=12)
    monkeypatch.setattr(LineEncoder, "__call__", None)
    equal = ParallelText(list(TEXT.source), list(TEXT.target))
    folder = tmp_path / "tokenizer"
    again, counted = encode_pairs(equal, folder, cache_dir=tmp_path / "pairs", num_proc=2, max_length=12)
    assert again.cache_files == first.cache_files
    assert counted == counts


def test_another_text_tokenizer_or_limit_is_encoded_anew(tokenizer, tmp_path):
    larger = load_tokenizer(train_tokenizer(TEXT, 350, tmp_path / "tokenizer"))
    files = [
        encode_pairs(text, chosen, cache_dir=tmp_path / "pairs", **limit)[0].cache_files[0]["filename"]
        for text, chosen, limit in (
            (TEXT, tokenizer, {}),
            (ParallelText(TEXT.target, TEXT.source), tokenizer, {}),
            (TEXT, larger, {}),
            (TEXT, tokenizer, {"max_length": 12}),
            (TEXT, tokenizer, {"max_length": 12, "max_ratio": 2.0}),
        )
    ]
    assert len(set(files)) == len(files)
    assert len(list((tmp_path / "pairs").glob("pairs-*"))) == len(files)


def test_an_interrupted_encoding_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LengthLimit, "broken_by", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode_pairs(TEXT, tokenizer, cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert len(encode_pairs(TEXT, tokenizer, cache_dir=tmp_path)[0]) == len(TEXT)


def test_sides_without_a_piece_drop_their_pair_and_are_counted(tmp_path):
    tokenizer = load_tokenizer(train_tokenizer(TEXT, 340, tmp_path, normalization="nmt_nfkc"))
    text = ParallelText(["the dog", "", "a cat", "\u200b\ufeff"], ["Hund", "Katze", " \t", "Haus"])
    dataset, counts = encode_pairs(text, tokenizer, cache_dir=tmp_path)
    assert dataset["input_ids"][:] == tokenizer(["the dog"])["input_ids"]
    assert counts == {"empty": 3, "too_long": 0, "length_ratio": 0}


@pytest.mark.parametrize("max_length", [6, 10, 15, 1_000])
def test_pairs_over_the_limit_are_dropped_and_every_pair_is_accounted_for(encoded, tokenizer, tmp_path, max_length):
    text = ParallelText([*TEXT.source, ""], [*TEXT.target, "Hund"])
    whole = encoded[0]
    short = [n for n, length in enumerate(lengths(whole)) if length <= max_length]
    if not short:
        with pytest.raises(DataError, match=r"no pair is left of 101: dropped 1 empty, 100 too_long"):
            encode_pairs(text, tokenizer, cache_dir=tmp_path, max_length=max_length)
        return
    dataset, counts = encode_pairs(text, tokenizer, cache_dir=tmp_path, max_length=max_length)
    assert dataset[:] == whole.select(short)[:]
    assert counts["too_long"] == len(whole) - len(short)
    assert len(dataset) + sum(counts[reason] for reason in DROP_REASONS) == len(text)


@pytest.mark.parametrize("max_ratio", [1.0, 1.1, 1.5, 2.0, 9.5])
@pytest.mark.parametrize("max_length", [40, None])
def test_uneven_pairs_are_dropped_by_the_rule_said_pair_by_pair(tokenizer, tmp_path, max_ratio, max_length):
    short, longer = "a dog", " ".join(["the big dog"] * 9)
    text = ParallelText([*TEXT.source, short, longer, longer, ""], [*TEXT.target, longer, longer, short, "Hund"])
    limits = {"max_length": max_length, "max_ratio": max_ratio}
    dataset, counts = encode_pairs(text, tokenizer, cache_dir=tmp_path, **limits)
    sides = [[len(ids) - 1 for ids in tokenizer(side)["input_ids"]] for side in (text.source, text.target)]
    kept, uneven = 0, 0
    for a, b in zip(*sides, strict=True):
        if min(a, b) == 0 or (max_length is not None and max(a, b) >= max_length):
            continue
        limit = max(9.0, max_ratio) if max(a, b) <= 10 else max_ratio
        uneven += max(a, b) / min(a, b) > limit
        kept += max(a, b) / min(a, b) <= limit
    assert uneven >= 2 * (max_length is None)
    assert (len(dataset), counts["length_ratio"]) == (kept, uneven)
    assert len(dataset) + sum(counts[reason] for reason in DROP_REASONS) == len(text)


def test_short_pairs_may_be_nine_times_apart():
    pairs = zip([1, 1, 2, 5, 5, 40], [9, 10, 11, 8, 8, 41], strict=True)
    found = [LengthLimit(max_ratio=1.5).broken_by(source + 1, target + 1) for source, target in pairs]  # with eos
    assert found == [None, "length_ratio", "length_ratio", None, None, None]


def test_a_text_of_which_nothing_is_left_is_an_error_and_not_cached(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no pair is left of 1: dropped 1 empty"):
        encode_pairs(ParallelText(["a"], [""]), tokenizer, cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2.* got 1"),
        ({"max_ratio": 0.9}, r"max_ratio must be at least 1, got 0\.9"),
    ],
)
def test_impossible_options_are_refused(tokenizer, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        encode_pairs(TEXT, tokenizer, cache_dir=tmp_path, **options)


def test_separate_vocabularies_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(tmp_path / "vocab.json", tmp_path / "target_vocab.json")
    separate = MarianTokenizer.from_pretrained(
        tmp_path, separate_vocabs=True, target_vocab_file=str(tmp_path / "target_vocab.json")
    )
    with pytest.raises(DataError, match="separate vocabularies; a joint one is needed"):
        LineEncoder(separate, is_target=True)


def test_a_data_loader_takes_batches_of_any_size(encoded):
    batches = [[4, 2, 99], [0], [7, 7]]
    loader = DataLoader(encoded[0], batch_sampler=batches, collate_fn=TranslationCollator(0, 0))
    for indices, batch in zip(batches, loader, strict=True):
        for n, i in enumerate(indices):
            assert batch["labels"][n][batch["labels"][n] != IGNORE_INDEX].tolist() == encoded[0][i]["labels"]


@pytest.mark.parametrize("start", [None, 7])  # where the decoder does not start with the padding too
def test_batches_are_those_of_data_collator_for_seq2seq(start, encoded, tokenizer, model, monkeypatch):
    if start is not None:
        monkeypatch.setattr(model.config, "decoder_start_token_id", start)
    collate = TranslationCollator(tokenizer.pad_token_id, model.config.decoder_start_token_id)
    reference = DataCollatorForSeq2Seq(tokenizer, model=model)
    pairs = encoded[0]
    for indices in ([0], [3, 41], list(range(0, 100, 7))):
        rows = encoded[0].select_columns(["input_ids", "labels"]).select(indices).to_list()
        wanted = reference(rows)
        for samples in (pairs.__getitems__(indices), rows):
            got = collate(samples)
            assert got.keys() == wanted.keys()
            for name, x in got.items():
                torch.testing.assert_close(x, wanted[name], rtol=0, atol=0)


def test_padding_start_and_zero_are_three_ids():
    samples = [{"input_ids": [4, 0, 1], "labels": [8, 1]}, {"input_ids": [6, 1], "labels": [0, 9, 3, 1]}]
    batch = TranslationCollator(pad_token_id=5, decoder_start_token_id=7)(samples)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[4, 0, 1], [6, 1, 5]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[8, 1, -100, -100], [0, 9, 3, 1]],
        "decoder_input_ids": [[7, 8, 1, 5], [7, 0, 9, 3]],
    }


@pytest.mark.trap(35)
@pytest.mark.parametrize("num_copies", [1, 3])
def test_the_decoder_inputs_exist_and_every_tensor_is_repeated(encoded, model, num_copies):
    start = model.config.decoder_start_token_id
    batch = TranslationCollator(model.config.pad_token_id, start)(encoded[0].__getitems__([1, 30]))
    repeated = repeat_batch(batch, num_copies)
    assert set(repeated) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
    assert {len(x) for x in repeated.values()} == {2 * num_copies}
    shifted = model.prepare_decoder_input_ids_from_labels(repeated["labels"])
    torch.testing.assert_close(repeated["decoder_input_ids"], shifted)
    assert model(**repeated).logits.shape[:2] == repeated["labels"].shape


@needs_data
def test_ids_are_those_of_the_tokenizer_on_real_lines(tmp_path):
    text = read_parallel([DATA / "multi30k" / "val"], "en", "de")
    tokenizer = load_tokenizer(train_tokenizer(text, 2_000, tmp_path))
    lines = text.source[:300] + read_lines(DATA / "wmt_ende" / "newstest2009.de.xz")[:300]
    assert LineEncoder(tokenizer, is_target=True)(lines) == tokenizer(text_target=lines)["input_ids"]


@needs_data
def test_multi30k_is_encoded_whole(tmp_path):
    text = read_parallel([DATA / "multi30k" / "train"], "en", "de")
    dataset, counts = encode_pairs(text, train_tokenizer(text, 8_000, tmp_path), cache_dir=tmp_path, num_proc=2)
    assert isinstance(dataset, datasets.Dataset)
    assert len(dataset) == 29_000
    assert not any(counts.values())
    tokenizer = load_tokenizer(next(tmp_path.glob("tokenizer-*")))
    assert tokenizer.batch_decode(dataset["labels"][:200], skip_special_tokens=True) == [
        " ".join(unicodedata.normalize("NFKC", line).split()) for line in text.target[:200]
    ]
