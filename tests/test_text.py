import bz2
import gzip
import lzma
import os
from pathlib import Path

import pytest

from tasks.text.parallel import (
    DROP_REASONS,
    DataError,
    ParallelText,
    clean,
    describe_dropped,
    fingerprint,
    read_lines,
    read_parallel,
)

DATA = Path(os.environ.get("SEQBA_DATA", ""))
needs_data = pytest.mark.skipif("SEQBA_DATA" not in os.environ, reason="SEQBA_DATA names no folder of corpora")
INSIDE_A_LINE = "a\x85b", "c\u2028d", "e\u2029f", "g\vh\fi", "j\x1ck\x1dl\x1em", "n\ro"


def write_pair(folder: Path, name: str, en: bytes, de: bytes) -> str:
    (folder / f"{name}.en").write_bytes(en)
    (folder / f"{name}.de").write_bytes(de)
    return str(folder / name)


def test_plain_gz_and_xz_read_the_same(tmp_path):
    content = "a dog\nein Hund äöü 🙂\n".encode()
    (tmp_path / "x").write_bytes(content)
    (tmp_path / "x.gz").write_bytes(gzip.compress(content, mtime=0))
    (tmp_path / "x.xz").write_bytes(lzma.compress(content))
    texts = [read_lines(tmp_path / name) for name in ("x", "x.gz", "x.xz")]
    assert texts == [["a dog", "ein Hund äöü 🙂"]] * 3


def test_prefixes_are_joined_in_order_whichever_way_each_side_is_packed(tmp_path):
    first = write_pair(tmp_path, "first.v1", b"a\nb\n", b"A\nB\n")
    (tmp_path / "second.en.gz").write_bytes(gzip.compress(b"c\n", mtime=0))
    (tmp_path / "second.de.xz").write_bytes(lzma.compress(b"C\n"))
    text = read_parallel([first, tmp_path / "second"], "en", "de")
    assert text == ParallelText(["a", "b", "c"], ["A", "B", "C"])
    assert read_parallel(first, "de", "en") == ParallelText(["A", "B"], ["a", "b"])


@pytest.mark.trap(45)
@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_lines_end_at_newline_only(tmp_path, packed):
    content = "".join(f"{line}\n" for line in INSIDE_A_LINE).encode()
    path = tmp_path / f"text{packed}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[packed](content))
    assert read_lines(path) == list(INSIDE_A_LINE)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb", ["a", "b"]),  # no newline at the end
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\r\n", ["a\r"]),  # one carriage return belongs to the line end
        (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
        (b"\n", [""]),
        (b"a\n\n b \n", ["a", "", " b "]),  # blank lines and spaces stay
        ("a\ufeff\n\ufeffb\n".encode(), ["a\ufeff", "\ufeffb"]),  # a mark is one at the start of the file
    ],
)
def test_only_line_ends_and_the_byte_order_mark_are_removed(tmp_path, content, lines):
    (tmp_path / "text").write_bytes(content)
    assert read_lines(tmp_path / "text") == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text", b"", r"text is empty"),
        ("text", b"\xef\xbb\xbf", r"text is empty"),
        ("text.gz", gzip.compress(b"", mtime=0), r"text\.gz is empty"),
        ("text", b"a\nb\nc \xff\nd\n", r"text, line 3: not valid UTF-8 \(invalid start byte\)"),
        ("text", "ä\n".encode("latin-1"), r"text, line 1: not valid UTF-8"),
        ("text", b"a\n\xed\xa0\x80\n", r"text, line 2: not valid UTF-8"),  # a surrogate
        ("text.gz", b"plain", r"cannot read .*text\.gz: Not a gzipped file"),
        ("text.gz", gzip.compress(b"a\n" * 99, mtime=0)[:-9], r"cannot read .*text\.gz"),
        ("text.xz", b"plain", r"cannot read .*text\.xz"),
        ("text.xz", lzma.compress(b"a\n" * 99)[:-9], r"cannot read .*text\.xz"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_lines(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nothing.*No such file"):
        read_lines(tmp_path / "nothing")


def test_sides_of_different_lengths_are_refused_with_both_files_and_counts(tmp_path):
    prefix = write_pair(tmp_path, "train", b"a\nb\nc\n", b"A\nB\n")
    with pytest.raises(DataError, match=r"train\.en has 3 lines, .*train\.de has 2"):
        read_parallel([prefix], "en", "de")


def test_a_missing_language_is_answered_with_those_there_are(tmp_path):
    prefix = write_pair(tmp_path, "train", b"a\n", b"A\n")
    (tmp_path / "train.cs.xz").write_bytes(lzma.compress(b"x\n"))
    (tmp_path / "train.2.fr").write_bytes(b"x\n")  # a file of the prefix train.2
    wanted = r"in 'fr': looked for .*train\.fr, .*\.gz, .*\.xz, .*train\.fr\.bz2; this prefix has cs, de, en$"
    with pytest.raises(DataError, match=wanted):
        read_parallel([prefix], "en", "fr")
    (tmp_path / "train.it.bz2").write_bytes(bz2.compress(b"b\n"))
    assert read_parallel([prefix], "en", "it").target == ["b"]
    (tmp_path / "train.fr.zst").write_bytes(b"packed")
    with pytest.raises(DataError, match=r"train\.fr\.zst is there, and is not read; unpack it"):
        read_parallel([prefix], "en", "fr")
    with pytest.raises(DataError, match=r"train\.fr\.zst: \.zst is not read; unpack it"):
        read_lines(tmp_path / "train.fr.zst")
    with pytest.raises(DataError, match=r"no file for .*trian in 'en'.* this prefix has no language"):
        read_parallel([tmp_path / "trian"], "en", "de")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read_parallel([tmp_path / "nowhere" / "train"], "en", "de")


def test_one_side_in_two_files_is_refused(tmp_path):
    prefix = write_pair(tmp_path, "train", b"a\n", b"A\n")
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"B\n", mtime=0))
    with pytest.raises(DataError, match=r"several files .* in 'de', keep one: .*train\.de, .*train\.de\.gz"):
        read_parallel([prefix], "en", "de")


@pytest.mark.parametrize(
    ("prefixes", "langs", "message"),
    [([], ("en", "de"), "no prefix"), (["p"], ("en", "en"), "source and target language are both 'en'")],
)
def test_a_request_that_names_no_pair_of_texts_is_refused(prefixes, langs, message):
    with pytest.raises(DataError, match=message):
        read_parallel(prefixes, *langs)


def test_sides_in_memory_must_match_too():
    with pytest.raises(DataError, match="got 2 and 1"):
        ParallelText(["a", "b"], ["A"])


def test_cleaning_drops_pairs_with_a_blank_side_and_counts_them():
    text = ParallelText(["a", "", "c", " \t\x85", "e"], ["A", "B", "\u3000", "", "E"])
    kept, dropped = clean(text)
    assert kept == ParallelText(["a", "e"], ["A", "E"])
    assert dropped == {"empty": 3, "too_long": 0, "length_ratio": 0}
    assert tuple(dropped) == DROP_REASONS
    assert describe_dropped(dropped) == "dropped 3 empty"


def test_cleaning_that_leaves_nothing_is_an_error():
    with pytest.raises(DataError, match="no pair is left of 2: dropped 2 empty"):
        clean(ParallelText(["", "b"], ["A", ""]))


@pytest.mark.trap(60)
@pytest.mark.parametrize("line", [0, 9_999, 10_000, 10_001, 25_000])
def test_a_fingerprint_reads_every_line_of_both_sides(line):
    source, target = [[f"{side} {n}" for n in range(25_001)] for side in ("a", "b")]
    name = fingerprint(ParallelText(source, target))
    for side in (source, target):
        side[line], kept = "other", side[line]
        assert fingerprint(ParallelText(source, target)) != name
        side[line] = kept
    assert fingerprint(ParallelText(source, target)) == name


def test_a_fingerprint_is_of_the_content_alone():
    text = ParallelText(["ab", "c"], ["d", "é"])
    others = [
        ParallelText(["a", "bc"], ["d", "é"]),  # the same characters, cut elsewhere
        ParallelText(["ab\nc"], ["d\né"]),
        ParallelText(["ab", "c"], ["é", "d"]),
        ParallelText(["d", "é"], ["ab", "c"]),
        ParallelText(["ab", "c"], ["d", "e\u0301"]),
        ParallelText(["ab", "c", ""], ["d", "é", ""]),
    ]
    names = {fingerprint(other) for other in others}
    assert len(names) == len(others)
    assert fingerprint(text) not in names
    assert fingerprint(text) == fingerprint(ParallelText(list(text.source), list(text.target)))


@needs_data
@pytest.mark.trap(45)
@pytest.mark.parametrize(("name", "pairs"), [("newstest2009", 2525), ("newssyscomb2009", 502)])
def test_newstest_files_with_u0085_keep_their_count(name, pairs):
    text = read_parallel([DATA / "wmt_ende" / name], "en", "de")
    assert len(text) == pairs
    assert sum(len(line.splitlines()) for line in text.target) > pairs  # the trap is in this file


@needs_data
@pytest.mark.parametrize(
    ("split", "pairs"),
    [("train", 29_000), ("val", 1_014), ("test_2016_flickr", 1_000), ("test_2018_flickr", 1_071)],
)
def test_multi30k_has_the_published_counts_and_no_blank_side(split, pairs):
    text, dropped = clean(read_parallel([DATA / "multi30k" / split], "en", "de"))
    assert len(text) == pairs
    assert not any(dropped.values())
