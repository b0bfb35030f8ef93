import json
import os
import re
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
import sentencepiece
from transformers import MarianTokenizer

from tasks.text import tokenizer as tokenizer_module
from tasks.text.parallel import DataError, ParallelText, fingerprint, read_parallel
from tasks.text.tokenizer import (
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

DATA = Path(os.environ.get("SEQBA_DATA", ""))
needs_data = pytest.mark.skipif("SEQBA_DATA" not in os.environ, reason="SEQBA_DATA names no folder of corpora")

NOUNS = ["dog", "cat", "house", "tree", "river", "mountain", "child", "teacher", "window", "garden"]
NOMEN = ["Hund", "Katze", "Haus", "Baum", "Fluß", "Berg", "Kind", "Lehrer", "Fenster", "Gärten"]
TEXT = ParallelText(
    [f"the {a} sees the {b} ." for a in NOUNS for b in NOUNS],
    [f"{a} sieht heute {b} ." for a in NOMEN for b in NOMEN],
)
SIZE = 340


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_tokenizer(TEXT, SIZE, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def normal(line):
    """What training and decoding keep of a line: NFKC, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", line).split())


def test_a_fresh_process_loads_the_folder_with_transformers_alone(folder, tokenizer, tmp_path):
    program = (
        "import sys, json, warnings; warnings.simplefilter('ignore')\n"
        "from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = t('the dog', text_target='der Hund')\n"
        "print(json.dumps([type(t).__name__, ids['input_ids'], ids['labels'], 'tasks' in sys.modules]))\n"
    )
    run = [sys.executable, "-c", program, str(folder)]
    printed = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    ids = tokenizer("the dog", text_target="der Hund")
    assert json.loads(printed) == ["MarianTokenizer", ids["input_ids"], ids["labels"], False]


def test_ids_of_sentencepiece_are_ids_of_the_model(folder, tokenizer):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for model in (tokenizer.spm_source, tokenizer.spm_target):
        assert [vocabulary[model.id_to_piece(i)] for i in range(SIZE)] == list(range(SIZE))
    assert len(tokenizer) == len(vocabulary) == SIZE
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None


def test_both_sides_share_one_vocabulary_and_end_in_eos(tokenizer):
    line = "the Katze sieht the house ."
    both = tokenizer(line, text_target=line)
    assert both["input_ids"] == both["labels"]
    assert both["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer(TEXT.source[0])["input_ids"][:-1] == tokenizer.spm_source.encode(TEXT.source[0])


LINES = pytest.mark.parametrize(
    "line",
    [
        "Katze sieht heute Baum .",
        "Hallo , Welt ! wo n't , ( so ) \" ' .",  # no clean-up of spaces before punctuation
        "unseen Ωmega 漢字 🙂 👩‍👩‍👧 é e\u0301 ﬁ ½ … ™ ²",
        "  tabs\tand   spaces\u00a0here \u3000 ",
        ">> no code, <0x41> no byte < unk >",
        "全角，標點！「引號」… ⟨a⟩ \u200b e\u0301",
        "",
    ],
)


@LINES
def test_decoding_returns_the_line_and_nothing_is_unknown(tokenizer, line):
    ids = tokenizer(line)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(word for word in line.split(" ") if word).strip()


@LINES
def test_or_the_normalised_line_where_that_is_asked_for(line, tmp_path):
    tokenizer = load_tokenizer(train_tokenizer(TEXT, SIZE, tmp_path, normalization="nmt_nfkc"))
    ids = tokenizer(line)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == normal(line.replace("\u200b", ""))


def test_text_decides_the_cache_and_equal_text_is_not_trained_again(tmp_path, monkeypatch):
    first = train_tokenizer(TEXT, SIZE, tmp_path)
    larger = train_tokenizer(TEXT, SIZE + 1, tmp_path)
    other = train_tokenizer(ParallelText(TEXT.source, TEXT.target[::-1]), SIZE, tmp_path)
    folded = train_tokenizer(TEXT, SIZE, tmp_path, normalization="nmt_nfkc")
    assert len({first, larger, other, folded}) == 4
    assert sorted(tmp_path.glob("[!.]*")) == sorted([first, larger, other, folded])  # nothing unfinished beside them

    def refuse(**_):
        raise AssertionError("trained again")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", refuse)
    equal = ParallelText(list(TEXT.source), list(TEXT.target))
    assert train_tokenizer(equal, SIZE, tmp_path) == first


def test_equal_text_is_equal_bytes_and_threads_do_not_change_the_pieces(folder, tmp_path, monkeypatch):
    again = train_tokenizer(TEXT, SIZE, tmp_path)
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}
    monkeypatch.setitem(tokenizer_module.TRAINING_OPTIONS, "num_threads", 1)
    alone = train_tokenizer(TEXT, SIZE, tmp_path)
    assert alone != again
    assert (alone / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()
    assert load_tokenizer(alone)(TEXT.target)["input_ids"] == load_tokenizer(folder)(TEXT.target)["input_ids"]


def test_a_large_text_is_sampled_evenly_from_both_sides(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_TRAINING_LINES", 60)
    lines = list(tokenizer_module._training_lines(TEXT))
    assert lines == TEXT.source[::4] + TEXT.target[::4]
    assert len(lines) <= 60
    monkeypatch.setattr(tokenizer_module, "MAX_TRAINING_LINES", 2 * len(TEXT))
    assert list(tokenizer_module._training_lines(TEXT)) == TEXT.source + TEXT.target


def test_a_vocabulary_larger_than_the_text_allows_names_the_largest(tmp_path):
    wanted = r"a vocabulary of 50000 pieces is larger than this text allows: at most (\d+)"
    with pytest.raises(DataError, match=wanted) as caught:
        train_tokenizer(TEXT, 50_000, tmp_path)
    most = int(re.search(wanted, str(caught.value))[1])
    assert len(load_tokenizer(train_tokenizer(TEXT, most, tmp_path))) == most
    with pytest.raises(DataError, match=rf"{most + 1} pieces is larger .* at most {most}"):
        train_tokenizer(TEXT, most + 1, tmp_path)


@pytest.mark.parametrize("size", [-1, 0, 2, 3, 100])
def test_a_vocabulary_too_small_for_the_characters_names_the_smallest(tmp_path, size):
    wanted = rf"a vocabulary of {size} pieces is too small for the characters of this text: at least (\d+)"
    with pytest.raises(DataError, match=wanted) as caught:
        train_tokenizer(TEXT, size, tmp_path)
    least = int(re.search(wanted, str(caught.value))[1])
    assert len(load_tokenizer(train_tokenizer(TEXT, least, tmp_path))) == least


def test_blank_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="the text is blank"):
        train_tokenizer(ParallelText(["", " "], ["", "\t"]), SIZE, tmp_path)


def test_a_complaint_of_sentencepiece_without_numbers_is_passed_on(tmp_path, monkeypatch):
    def complain(**_):
        raise RuntimeError("INTERNAL: something new")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", complain)
    with pytest.raises(DataError, match="could not train a vocabulary of 340 pieces: INTERNAL: something new"):
        train_tokenizer(TEXT, SIZE, tmp_path)


def test_training_is_silent_when_it_works_and_when_it_fails(tmp_path, capfd):
    train_tokenizer(TEXT, SIZE, tmp_path)
    with pytest.raises(DataError):
        train_tokenizer(TEXT, 50_000, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MarianTokenizer, "save_pretrained", interrupt)  # the spm files are written by then
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(TEXT, SIZE, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert len(load_tokenizer(train_tokenizer(TEXT, SIZE, tmp_path))) == SIZE


def test_a_folder_without_tokenizer_is_refused_by_name(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a tokenizer folder: it has no source\.spm, target\.spm"):
        load_tokenizer(tmp_path / "nowhere")
    for name in ("source.spm", "target.spm", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(DataError, match=r"it has no vocab\.json$"):
        load_tokenizer(tmp_path)


def test_loading_hides_the_advice_on_sacremoses_and_no_other_warning(folder, monkeypatch):
    def warn(*_, **__):
        warnings.warn("Recommended: pip install sacremoses.", stacklevel=2)
        warnings.warn("something else", stacklevel=2)

    monkeypatch.setattr(MarianTokenizer, "from_pretrained", warn)
    with pytest.warns(UserWarning, match="something else") as caught:
        load_tokenizer(folder)
    assert len(caught) == 1


def test_a_tokenizer_is_named_by_what_decides_its_ids(folder, tmp_path):
    same, added = load_tokenizer(folder), load_tokenizer(folder)
    same.model_max_length = 7
    added.add_tokens(["Katze"])
    other = load_tokenizer(train_tokenizer(TEXT, SIZE + 1, tmp_path))
    names = [tokenizer_fingerprint(t) for t in (load_tokenizer(folder), same, added, other)]
    assert names[0] == names[1]
    assert len(set(names)) == 3


@needs_data
def test_multi30k_trains_8000_pieces_and_decodes_as_it_was(tmp_path):
    text = read_parallel([DATA / "multi30k" / "train"], "en", "de")
    tokenizer = load_tokenizer(train_tokenizer(text, 8_000, tmp_path))
    assert len(tokenizer) == 8_000
    unseen = read_parallel([DATA / "multi30k" / "test_2016_flickr"], "en", "de")
    assert fingerprint(unseen) != fingerprint(text)
    for line in unseen.target[:300]:
        assert tokenizer.decode(tokenizer(text_target=line)["input_ids"], skip_special_tokens=True) == normal(line)
