"""Folders that their name determines: whole, made once, and made again where they are damaged."""

import logging
import multiprocessing
import os
import time

import datasets
import pytest

from tasks.cli.cache import fill_cache
from tasks.text.parallel import ParallelText
from tasks.text.tokenizer import load_tokenizer, train_tokenizer
from tasks.translation.data import encode_pairs

LINES = 25_000  # of three record batches


def visible(folder):
    return [path.name for path in folder.glob("[!.]*")]


def test_while_a_folder_is_filled_only_a_hidden_one_exists_and_a_failed_one_leaves_nothing(tmp_path):
    def fill(unfinished):
        (unfinished / "half").write_text("half")
        assert unfinished.name.startswith(".")
        assert visible(tmp_path) == []
        if failing:
            raise KeyboardInterrupt

    failing = True
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path / "it", fill)
    assert visible(tmp_path) == []
    assert not (tmp_path / ".it.part").exists()
    failing = False
    fill_cache(tmp_path / "it", fill)
    assert visible(tmp_path) == ["it"]


def test_parts_left_by_a_kill_are_not_taken_over_and_are_removed(tmp_path):
    left = tmp_path / ".it.part"
    left.mkdir()
    (left / "old").write_text("of a killed process")
    fill_cache(tmp_path / "it", lambda unfinished: (unfinished / "new").write_text("x"))
    assert not left.exists()
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == ["manifest.json", "new"]


def slow_fill(folder):
    def fill(unfinished):
        with (folder.parent / "fills").open("a") as file:
            file.write("x")
        time.sleep(0.5)
        (unfinished / "content").write_text("whole")

    fill_cache(folder, fill)
    assert (folder / "content").read_text() == "whole"


def test_of_two_processes_one_fills_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=slow_fill, args=(tmp_path / "it",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "fills").read_text() == "x"


@pytest.mark.trap(60)
@pytest.mark.parametrize("damage", ["cut at a batch", "cut", "bit", "counts", "gone"])
def test_damaged_pairs_are_made_again_whole_and_the_log_says_so(damage, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    text = ParallelText([f"a dog {n % 50}" for n in range(LINES)], [f"ein Hund {n % 50}" for n in range(LINES)])
    tokenizer = load_tokenizer(train_tokenizer(text, 300, tmp_path))
    dataset, counts = encode_pairs(text, tokenizer, cache_dir=tmp_path)
    whole = dataset[:]
    (folder,) = tmp_path.glob("pairs-*")
    file = folder / "pairs.arrow"
    content = file.read_bytes()
    del dataset
    if damage == "cut at a batch":
        part = datasets.Dataset.from_dict({name: column[:10_000] for name, column in whole.items()})
        part.save_to_disk(str(tmp_path / "part"))
        (shard,) = (tmp_path / "part").glob("*.arrow")
        file.write_bytes(shard.read_bytes())
    elif damage == "cut":
        os.truncate(file, len(content) // 2)
    elif damage == "bit":
        file.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    elif damage == "counts":
        (folder / "counts.json").write_text("{}")
    else:
        file.unlink()
    again, counted = encode_pairs(text, tokenizer, cache_dir=tmp_path)
    assert again[:] == whole
    assert counted == counts
    assert f"the cached folder {folder} is damaged" in caplog.text
    caplog.clear()
    encode_pairs(text, tokenizer, cache_dir=tmp_path)
    assert not caplog.text


def test_a_damaged_tokenizer_is_made_again(tmp_path):
    text = ParallelText(["a dog", "a cat"] * 50, ["ein Hund", "eine Katze"] * 50)
    folder = train_tokenizer(text, 280, tmp_path)
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in content:
        (folder / name).write_text("{}")
        assert train_tokenizer(text, 280, tmp_path) == folder
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
