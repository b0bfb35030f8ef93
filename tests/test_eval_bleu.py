import dataclasses
import gzip
import json
import lzma
import re

import pytest
import sacrebleu
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from bad_input import call
from tasks.cli.errors import UserError
from tasks.cli.options import flag
from tasks.decoding.search import Decoding
from tasks.scoring.bleu import paired_bootstrap
from tasks.scoring.hypotheses import hypothesis_files
from tasks.translation.evaluation import evaluate as evaluation
from tasks.translation.evaluation.config import EvaluationConfig, parse_evaluation
from tasks.translation.evaluation.table import format_bootstrap, format_scores
from tiny_models import SEQ2SEQ, VOCABULARY, bart, gpt2
from word_tokenizer import copying_model, sentences, word_tokenizer

SOURCES = sentences(9, longest=8)
REFERENCES = ["w3 w4 w5 w6", *SOURCES[1:]]


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run the script in this process: what it printed, or the verdict where it ended with an error."""

    def run(*argv):
        return call("eval_bleu.py", argv, monkeypatch, capsys)

    return run


def write_lines(path, lines):
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(text))
    return path


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: save(folder / f"run-{family}" / "model", copying_model(family)) for family in SEQ2SEQ}


@pytest.fixture
def text(tmp_path):
    write_lines(tmp_path / "test.en", SOURCES)
    write_lines(tmp_path / "test.de", REFERENCES)
    return tmp_path / "test"


# ---- the script, end to end


@pytest.mark.trap(58)
def test_the_tokeniser_that_is_asked_for_scores_and_compares(models, text, tmp_path, run_script):
    folders = [models[family] for family in list(SEQ2SEQ)[:2]]
    options = ["--model", *folders, "--test-prefix", text, "--output-dir", tmp_path / "out", "--cpu"]
    verdict = run_script(*options, "--bleu-tokenize", "char", "--num-beams", "1")
    assert verdict.status == 0, verdict.error
    test = json.loads((tmp_path / "out" / "results.json").read_text())["tests"]["test"]
    signatures = [score["signature"] for one in test["systems"].values() for score in one["scores"][:1]]
    signatures += [score["signature"] for score in test["paired_bootstrap"] if score["metric"] == "BLEU"]
    assert len(signatures) == 4
    assert all("tok:char" in signature for signature in signatures)


@pytest.mark.trap(36)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_folder_of_any_family_is_translated_scored_and_described(family, models, text, tmp_path, run_script):
    out = tmp_path / "out"
    verdict = run_script("--model", models[family], "--test-prefix", text, "--output-dir", out, "--cpu")
    assert verdict.status == 0, verdict.error
    said = verdict.stdout
    hypotheses = (out / f"hyp.run-{family}.test.txt").read_text("utf-8").split("\n")[:-1]
    assert len(hypotheses) == len(SOURCES)
    results = json.loads((out / "results.json").read_text())
    scores = {score["metric"]: score for score in results["tests"]["test"]["systems"][f"run-{family}"]["scores"]}
    bleu, chrf = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()
    assert scores["BLEU"]["value"] == pytest.approx(bleu.corpus_score(hypotheses, [REFERENCES]).score)
    assert scores["chrF2"]["value"] == pytest.approx(chrf.corpus_score(hypotheses, [REFERENCES]).score)
    assert scores["BLEU"]["signature"] == str(bleu.get_signature())
    for part in ("beam 4, log-probability / L^0.6", str(bleu.get_signature()), str(chrf.get_signature()),
                 "get_ende_bleu.sh", f"{scores['BLEU']['value']:.2f}"):  # fmt: skip
        assert part in said, part
    # the same folder, by transformers alone
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(models[family]), word_tokenizer()
    batch = tokenizer(SOURCES[0], return_tensors="pt")
    alone = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        num_beams=4,
        length_penalty=0.6,
        max_new_tokens=36,
    )
    assert hypotheses[0] == tokenizer.decode(alone[0], skip_special_tokens=True)


@pytest.mark.trap(58)
@pytest.mark.parametrize(("target", "tokenizer"), [("de", "13a"), ("zh", "zh")])
def test_both_kinds_of_bleu_are_tokenised_by_the_target_language(target, tokenizer, models, tmp_path, run_script):
    write_lines(tmp_path / "test.zh" if target == "de" else tmp_path / "test.de", SOURCES)
    write_lines(tmp_path / f"test.{target}", REFERENCES)
    langs = ["--source-lang", "zh" if target == "de" else "de", "--target-lang", target]
    argv = ["--model", models["bart"], models["t5"], "--test-prefix", tmp_path / "test", *langs, "--num-beams", "1"]
    verdict = run_script(*argv, "--cpu", "--output-dir", tmp_path / "out", "--num-samples-bootstrap", "3")
    assert verdict.status == 0, verdict.error
    test = json.loads((tmp_path / "out" / "results.json").read_text())["tests"]["test"]
    for system in test["systems"].values():
        signatures = {score["metric"]: score["signature"] for score in system["scores"]}
        assert f"tok:{tokenizer}|" in signatures["BLEU"]
        assert f"tok:moses-{target} " in signatures["tokenised BLEU"]
    compared = [score["signature"] for score in test["paired_bootstrap"] if score["metric"] == "BLEU"]
    assert all(f"tok:{tokenizer}|" in signature for signature in compared)


def test_the_tables_columns_are_those_of_their_heads():
    score = {"system": "a", "metric": "BLEU", "value": 1.25, "mean": 2.5, "confidence": 3.75, "p_value": 0.5,
             "signature": "s"}  # fmt: skip
    head, first, second, note = format_bootstrap([score | {"p_value": None}, score | {"system": "b"}]).split("\n")
    assert head.split() == ["model", "metric", "score", "mean", "+-", "95", "%", "p"]
    assert first.split() == ["a", "BLEU", "1.25", "2.50", "3.75", "baseline"]
    assert second.split() == ["b", "BLEU", "1.25", "2.50", "3.75", "0.5000"]
    assert note == "paired bootstrap, BLEU: s"
    scores = [{"metric": "BLEU", "value": 1.25, "signature": "s"}, {"metric": "chrF2", "value": 2.5, "signature": "t"}]
    lines = format_scores({"a": {"scores": scores, "line_ends_replaced": 0, "seconds": 7.5}}).split("\n")
    assert [line.split() for line in lines] == [
        ["model", "BLEU", "chrF2", "seconds"], ["a", "1.25", "2.50", "7.5"], ["BLEU:", "s"], ["chrF2:", "t"]
    ]  # fmt: skip


def test_a_source_that_only_the_prefix_makes_too_long_is_counted_as_cut(models, tmp_path, run_script):
    source = write_lines(tmp_path / "s", [" ".join(["w7"] * 62), "w5 w6"])  # 63 of 64 positions with eos
    argv = ["--model", models["bart"], "--source", source, "--reference", source, "--cpu", "--num-beams", "1"]
    for prefix, cut in (("", 0), ("w8 ", 0), ("w8 w9 ", 1)):
        out = tmp_path / f"out{len(prefix)}"
        verdict = run_script(*argv, "--output-dir", out, "--source-prefix", prefix)
        assert verdict.status == 0, verdict.error
        assert json.loads((out / "results.json").read_text())["tests"]["s"]["systems"]["run-bart"]["truncated"] == cut


def test_the_masks_of_mc_dropout_follow_the_seed(text, tmp_path, run_script):
    folder = save(tmp_path / "dropping", copying_model("bart", dropout=0.4))
    argv = ["--model", folder, "--test-prefix", text, "--cpu", "--num-beams", "2", "--mc-dropout", "1"]
    found = []
    for run, seed in enumerate((1, 1, 2, 3)):
        verdict = run_script(*argv, "--seed", seed, "--output-dir", tmp_path / f"{run}")
        assert verdict.status == 0, verdict.error
        found.append((tmp_path / f"{run}" / "hyp.dropping.test.txt").read_text())
    assert found[0] == found[1]
    assert len(set(found[1:])) > 1


def test_test_sets_are_scored_apart_packed_or_not_and_systems_are_compared(models, text, tmp_path, run_script):
    source = write_lines(tmp_path / "other.src.gz", SOURCES[:4])
    reference = write_lines(tmp_path / "other.ref.xz", REFERENCES[:4])
    out = tmp_path / "out"
    argv = ["--model", models["bart"], models["t5"], "--test-prefix", text, "--source", source,
            "--reference", reference, "--output-dir", out, "--cpu", "--num-samples-bootstrap", "20",
            "--seed", "7"]  # fmt: skip
    verdict = run_script(*argv)
    assert verdict.status == 0, verdict.error
    results = json.loads((out / "results.json").read_text())
    assert list(results["tests"]) == ["test", "other.src"]
    assert [test["sentences"] for test in results["tests"].values()] == [9, 4]
    assert sorted(path.name for path in out.glob("hyp.*")) == [
        "hyp.run-bart.other.src.txt", "hyp.run-bart.test.txt", "hyp.run-t5.other.src.txt", "hyp.run-t5.test.txt"
    ]  # fmt: skip
    lines = {name: (out / f"hyp.{name}.test.txt").read_text().split("\n")[:-1] for name in ("run-bart", "run-t5")}
    compared = paired_bootstrap(lines, REFERENCES, num_samples=20, seed=7)
    assert results["tests"]["test"]["paired_bootstrap"] == [vars(score) for score in compared]
    assert all(part in verdict.stdout for part in ("seed:7", "bs:20", "run-t5", "baseline"))


def test_test_sets_of_any_name_have_files_of_their_own(models, tmp_path, run_script):
    for name in ("a b", "a:b"):
        write_lines(tmp_path / f"{name}.en", SOURCES[:2])
        write_lines(tmp_path / f"{name}.de", REFERENCES[:2])
    out = tmp_path / "out"
    prefixes = [tmp_path / "a b", tmp_path / "a:b"]
    verdict = run_script("--model", models["bart"], "--test-prefix", *prefixes, "--output-dir", out, "--cpu")
    assert verdict.status == 0, verdict.error
    tests = json.loads((out / "results.json").read_text())["tests"]
    files = {name: test["systems"]["run-bart"]["file"] for name, test in tests.items()}
    assert files == {"a b": "hyp.run-bart.a_b.txt", "a:b": "hyp.run-bart.a_b-2.txt"}
    assert {path.name for path in out.glob("hyp.*")} == set(files.values())


def test_file_names_are_safe_distinct_and_in_order():
    names = ["wmt16:test", "test", "x/test", "x\\test", "x_test-2", "X:TEST", "ä?*\n", "..", "", "d/" * 300 + "end"]
    files = hypothesis_files(names)
    assert files[:2] == ["hyp.wmt16_test.txt", "hyp.test.txt"]
    assert len({file.lower() for file in files}) == len(names)
    assert all(re.fullmatch(r"hyp\.[A-Za-z0-9._-]*\.txt", file) for file in files)
    assert all(len(file) < 255 for file in files)
    assert files[-1].endswith("_end.txt")


def test_a_line_end_inside_a_translation_becomes_a_space_and_is_counted(tmp_path, run_script):
    source = write_lines(tmp_path / "s", [f"w{VOCABULARY - 1} w{VOCABULARY - 1} w{VOCABULARY - 1}", "w5"])
    model = copying_model("bart")
    model.generation_config.update(min_new_tokens=3, suppress_tokens=list(range(2, VOCABULARY - 1)))
    folder = save(tmp_path / "breaking", model, word_tokenizer(last_word="x\r\ny"))
    out = tmp_path / "out"
    argv = ["--model", folder, "--source", source, "--reference", source, "--output-dir", out, "--cpu"]
    said = run_script(*argv).stdout
    hypotheses = (out / "hyp.breaking.s.txt").read_bytes()
    assert b"\r" not in hypotheses
    assert hypotheses.count(b"\n") == 2
    system = json.loads((out / "results.json").read_text())["tests"]["s"]["systems"]["breaking"]
    assert system["line_ends_replaced"] == sum("x y" in line for line in hypotheses.decode().split("\n")) > 0
    assert f"line ends inside {system['line_ends_replaced']} translation(s)" in said


def test_a_prefix_stands_before_every_source(models, text, tmp_path, run_script):
    with_prefix = write_lines(tmp_path / "prefixed.en", [f"w8 w9 {source}" for source in SOURCES])
    reference = text.with_suffix(".de")
    common = ["--model", models["bart"], "--reference", reference, "--cpu"]
    run_script(*common, "--source", with_prefix, "--output-dir", tmp_path / "a")
    run_script(*common, "--source", f"{text}.en", "--source-prefix", "w8 w9 ", "--output-dir", tmp_path / "b")
    first, second = ((tmp_path / run).glob("hyp.*") for run in "ab")
    assert next(first).read_text() == next(second).read_text()


@pytest.mark.trap(36)
def test_the_search_that_is_named_is_the_one_that_ran(models, text, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "translate", lambda *args, decoding, **more: seen.append(decoding) or list(SOURCES))
    argv = ["--model", str(models["bart"]), "--test-prefix", str(text), "--num-beams", "3", "--length-penalty", "1.5",
            "--length-penalty-kind", "gnmt-rerank", "--mc-dropout", "2", "--cpu"]  # fmt: skip
    results = evaluation.evaluate(*parse_evaluation(argv))
    assert seen == [Decoding(3, 1.5, "gnmt-rerank", 2)]
    assert results["models"]["run-bart"]["decoding"] == str(seen[0])


# ---- bad input: a clear error before anything is translated


def without_tokenizer(family):
    def make(folder):
        copying_model(family).save_pretrained(folder)
        return folder

    return make


def empty(folder):
    folder.mkdir()
    return folder


def a_file(folder):
    folder.write_text("x")
    return folder


def decoder_only(folder):
    return save(folder, gpt2())


def without_weights(folder):
    save(folder, bart())
    (folder / "model.safetensors").unlink()
    return folder


def with_damaged_weights(folder):
    save(folder, bart())
    (folder / "model.safetensors").write_bytes(b"damaged")
    return folder


def with_a_weight_missing(folder):
    save(folder, bart())
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.0.fc1.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_a_larger_tokenizer(folder):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w1000"])
    return save(folder, bart(), tokenizer)


def with_a_broken_config(folder):
    save(folder, bart())
    (folder / "config.json").write_text("{")
    return folder


@pytest.fixture
def no_translation(monkeypatch):
    """What fails must fail before any work."""
    monkeypatch.setattr(evaluation, "translate", lambda *args, **more: pytest.fail("translated"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_tokenizer("marian"), "has no tokenizer|a tokenizer cannot be loaded"),
        (without_tokenizer("bart"), r"has no tokenizer \(none of .*tokenizer.json.*\): save the model's there"),
        (without_tokenizer("t5"), r"has no tokenizer \(none of .*spiece.model.*\)"),
        (empty, "has no config.json: it is not a model folder"),
        (a_file, "is a file; a model is a folder, or a hub id"),
        (lambda folder: folder, "there is no such folder"),
        (lambda folder: "nobody/no-such-model", "nobody/no-such-model is neither a folder here nor a hub id that this"),
        (decoder_only, "is a gpt2, which is no encoder-decoder"),
        (without_weights, "its weights cannot be loaded from this folder .*no file named model.safetensors"),
        (with_damaged_weights, "its weights cannot be loaded from this folder"),
        (with_a_weight_missing, r"lacks 1 of its weights \(model.decoder.layers.0.fc1.bias"),
        (with_a_larger_tokenizer, "its tokenizer has 62 pieces, the model only 61"),
        (with_a_broken_config, "a model's config.json cannot be loaded from this folder .*not a valid JSON"),
    ],
)
def test_a_model_that_cannot_translate_is_refused_with_the_reason(
    make, message, text, tmp_path, no_translation, run_script
):
    verdict = run_script("--model", make(tmp_path / "given"), "--test-prefix", text, "--cpu")
    assert verdict.status == 1
    assert verdict.error.startswith("error: --model ")
    assert re.search(message, verdict.error), verdict.error
    assert "\n" not in verdict.error


def test_every_model_is_read_before_the_first_one_works(models, text, tmp_path, no_translation, run_script):
    verdict = run_script(
        "--model", models["bart"], without_weights(tmp_path / "second"), "--test-prefix", text, "--cpu"
    )
    assert "second: its weights cannot be loaded" in verdict.error


def test_a_run_that_has_results_keeps_them(models, text, tmp_path, no_translation, run_script):
    write_lines(tmp_path / "results.json", ["{}"])
    argv = ["--model", models["bart"], "--test-prefix", text, "--cpu", "--output-dir"]
    assert "already holds results.json; name another folder" in run_script(*argv, tmp_path).error
    assert (tmp_path / "results.json").read_text() == "{}\n"
    write_lines(tmp_path / "file", ["x"])
    assert "cannot write" in run_script(*argv, tmp_path / "file" / "below").error


def test_cuda_is_refused_where_there_is_none(models, text, no_translation, run_script, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    verdict = run_script("--model", models["bart"], "--test-prefix", text)
    assert verdict.status == 1
    assert "ACCELERATE_TORCH_DEVICE=cuda" in verdict.error


@pytest.mark.trap(34)
def test_masks_of_a_model_without_dropout_are_refused(text, tmp_path, no_translation, run_script):
    folder = save(tmp_path / "still", copying_model("bart", dropout=0.0))
    verdict = run_script("--model", folder, "--test-prefix", text, "--cpu", "--mc-dropout", 3)
    assert "--mc-dropout 3: the model still drops nothing out (its dropout probabilities are 0)" in verdict.error


def test_text_that_cannot_be_scored_is_refused(models, tmp_path, no_translation, run_script):
    short, long = write_lines(tmp_path / "short", ["a"]), write_lines(tmp_path / "long", ["a", "b"])
    (tmp_path / "latin1").write_bytes(b"gut\nsch\xf6n\n")
    argv = ["--model", models["bart"], "--cpu", "--source"]
    assert "short has 1 lines" in run_script(*argv, short, "--reference", long).error
    assert "latin1, line 2: not valid UTF-8" in run_script(*argv, short, "--reference", tmp_path / "latin1").error
    assert "cannot read" in run_script(*argv, tmp_path / "none", "--reference", long).error
    assert "no file for" in run_script(*argv[:3], "--test-prefix", short).error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model DIR names what is evaluated; none is given"),
        (["--model", "a", "a"], "--model a is given twice"),
        (["--model", "a"], "no text to translate: give --test-prefix P, or --source FILE with --reference FILE"),
        (["--model", "a", "--source", "s"], "--source needs --reference"),
        (["--model", "a", "--reference", "r"], "--reference needs --source"),
        (["--model", "a", "--num-beams", "0"], "--num-beams must be at least 1, got 0"),
        (["--model", "a", "--num-beams", "four"], "--num-beams.*four"),
        (["--model", "a", "--mc-dropout", "-1"], "--mc-dropout must be at least 0, got -1"),
        (["--model", "a", "--seed", "0"], "--seed must be at least 1, got 0"),
        (["--model", "a", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--model", "a", "--num-samples-bootstrap", "0"], "--num-samples-bootstrap must be at least 1, got 0"),
        (["--model", "a", "--length-penalty", "nan"], "--length-penalty must be finite, got nan"),
        (["--model", "a", "--length-penalty-kind", "wu"], "must be one of power, gnmt-rerank, got wu"),
        (
            ["--model", "a", "--length-penalty-kind", "gnmt-rerank", "--num-beams", "1"],
            "--num-beams must be at least 2",
        ),
        (
            ["--model", "a", "--test-prefix", "p", "--mixed-precision", "fp8"],
            "--mixed-precision must be one of no, bf16, fp16, got fp8",
        ),
        (["--model", "a", "--beam", "4"], "unknown option --beam 4"),
    ],
)
def test_a_bad_option_is_named_with_its_limit(argv, message):
    with pytest.raises(UserError, match=message):
        parse_evaluation(argv)


def test_every_option_has_help_and_dashes_and_underscores_are_both_taken():
    assert {"--model", "--source", "--reference", "--test-prefix", "--output-dir", "--num-beams", "--length-penalty",
            "--length-penalty-kind", "--mc-dropout", "--num-samples-bootstrap", "--seed"} <= {
        flag(option.name) for option in dataclasses.fields(EvaluationConfig)
    }  # fmt: skip
    assert all(len(option.metadata["help"]) > 15 for option in dataclasses.fields(EvaluationConfig))
    text = ["--model", "a", "--test-prefix", "p"]
    assert parse_evaluation([*text, "--mc_dropout", "3"]) == parse_evaluation([*text, "--mc-dropout", "3"])
