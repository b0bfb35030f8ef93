import json

import datasets
import pytest

from bad_input import OPTIONS, call
from tasks.text.generated.corpus import generate_corpus
from tasks.text.hub import read_dataset
from tasks.text.parallel import DataError, ParallelText, clean
from tasks.translation.prepare import read_sources, unique_names

PAIRS = [
    {"de": "Ein Hund.", "en": "A dog."},
    {"de": "Zwei\nZeilen.", "en": "Two lines."},
    {"de": None, "en": "No translation."},
]
TEXT = ParallelText(["A dog.", "Two lines.", "No translation."], ["Ein Hund.", "Zwei Zeilen.", ""])
CARD = """---
configs:
- config_name: de-en
  data_files:
  - split: train
    path: de-en/train-*
---
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The layout of wmt/wmt16, as `save_to_disk` writes it and as a copy of the hub's own files."""
    root = tmp_path_factory.mktemp("sets")
    split = datasets.Dataset.from_dict({"translation": PAIRS})
    datasets.DatasetDict({"train": split, "validation": split.select([0])}).save_to_disk(root / "saved" / "de-en")
    (root / "hub" / "de-en").mkdir(parents=True)
    split.to_parquet(root / "hub" / "de-en" / "train-00000-of-00001.parquet")
    (root / "hub" / "README.md").write_text(CARD)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(root / "plain")
    return root


@pytest.mark.parametrize("layout", ["saved", "hub"])
def test_both_layouts_are_read_side_by_side_a_sentence_a_line(folders, layout):
    text = read_dataset(f"datasets:{folders / layout}:de-en:train", "en", "de")
    assert text == TEXT
    assert read_dataset(f"datasets:{folders / layout}:de-en:train", "de", "en").source == TEXT.target
    assert clean(text)[1]["empty"] == 1


def test_data_sets_and_files_join(folders, tmp_path):
    (tmp_path / "more.en").write_text("one\n")
    (tmp_path / "more.de").write_text("eins\n")
    text = read_sources([f"datasets:{folders / 'saved'}:de-en:validation", str(tmp_path / "more")], "en", "de")
    assert text == ParallelText(["A dog.", "one"], ["Ein Hund.", "eins"])


def test_names_are_short_where_that_is_clear():
    sources = ["datasets:wmt/wmt14:de-en:test", "x/test_2016", "y/test_2016"]
    assert list(unique_names(sources)) == ["wmt14:test", "x/test_2016", "y/test_2016"]


@pytest.mark.parametrize(
    ("source", "langs", "message"),
    [
        ("{}/saved:de-en:test", "en de", "has the splits train, validation, not 'test'"),
        ("{}/hub:de-en:test", "en de", "cannot load datasets:.*test"),
        ("{}/hub:de-fr:train", "en de", "cannot load .*de-fr.*Available"),
        ("{}/saved:de-en:train", "en fr", "has the languages de, en, not 'fr'"),
        ("{}/plain::train", "en de", "has the columns text; parallel text needs 'translation'"),
        ("{}/nowhere::train", "en de", "cannot load .*nowhere"),
        ("wmt/wmt16:de-en:train", "en de", "cannot load .*must be a hub id that this machine can download"),
        ("wmt/wmt16", "en de", "is named datasets:NAME:CONFIG:SPLIT"),
        ("wmt/wmt16:de-en:", "en de", "is named datasets:NAME:CONFIG:SPLIT"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_there_is(folders, source, langs, message):
    with pytest.raises(DataError, match=message):
        read_dataset("datasets:" + source.format(folders), *langs.split())


def test_the_wmt16_preset_trains_on_a_data_set_in_its_layout_to_a_bleu(tmp_path, monkeypatch, capsys):
    corpus = generate_corpus(train=300, valid=20, test=8)
    names = {"train": "train", "valid": "validation", "test": "test"}
    rows = {
        names[split]: [{"de": de, "en": en} for en, de in zip(text.source, text.target, strict=True)]
        for split, text in corpus.items()
    }
    datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"translation": pairs}) for split, pairs in rows.items()}
    ).save_to_disk(tmp_path / "wmt16" / "de-en")
    text = [f"datasets:{tmp_path / 'wmt16'}:de-en:{split}" for split in names.values()]
    sources = zip(("--train-prefix", "--valid-prefix", "--test-prefix"), text, strict=True)
    places = [*(word for pair in sources for word in pair), "--cache-dir", tmp_path / "cache"]
    argv = ["--preset", "transformer-base-wmt16", *OPTIONS, *places, "--output-dir", tmp_path / "run"]
    verdict = call("train_wmt.py", argv, monkeypatch, capsys)
    assert verdict.status == 0, verdict.error
    assert "training text: dropped " in verdict.stdout  # the preset's own --max-length-ratio 1.5
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    test = results["tests"]["wmt16:test"]
    assert f"test wmt16:test: BLEU {test['bleu']:.2f}" in verdict.stdout
    assert test["file"] == "hyp.wmt16_test.txt"
    assert (tmp_path / "run" / test["file"]).read_text("utf-8").count("\n") == 8
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["preset"], config["lr_scale"], config["max_length_ratio"]) == ("transformer-base-wmt16", 1.0, 1.5)
