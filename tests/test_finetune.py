"""scripts/finetune.py: a model and data of any kind become a scored model folder, or one line that says why not."""

import functools
import json
import math
import re
import shutil

import datasets
import pytest
import sacrebleu
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from safetensors.torch import load_file, save_file
from test_audit_models import TINY, bert
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    GPT2LMHeadModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bad_input import call, contents
from distributed import run_ranks
from finetuning_runs import TRAINING, call_with, data, finetune, models, split
from tasks.cli.errors import DataError
from tasks.decoding.search import Decoding, translate
from tasks.finetuning import generated
from tasks.finetuning.config import FinetuningConfig, parse_finetuning
from tasks.finetuning.data import load_splits
from tasks.finetuning.encoding import encode
from tasks.finetuning.generated import generate_data
from tasks.finetuning.metric import token_nats_per_row
from tasks.text.data_sets import load_data_set
from tasks.text.generated.corpus import generate_corpus
from tasks.text.tokenizer import train_tokenizer
from tiny_models import gpt2, mixtral
from word_tokenizer import copying_model, sentences, word_tokenizer

CASES = [
    ("marian", "pairs", ""),
    ("bart", "renamed", "--source_column article --target_column summary"),
    ("t5", "wmt", "--source_lang en --target_lang de --source_prefix w5w6"),
    ("gpt2", "texts", ""),
    ("llama", "files", ""),
    ("gpt2", "alone", ""),
    ("bert", "classes", "--task classification"),
    ("bert", "named", "--text_column a --text_pair_column b --label_column kind"),
    ("llama", "classes", "--task classification"),
]


@pytest.mark.parametrize(("family", "name", "options"), CASES)
def test_a_model_of_any_kind_on_a_data_set_of_any_layout_becomes_a_scored_folder(
    family, name, options, models, data, finetune, tmp_path
):
    before = contents(data / name)
    verdict = finetune("--model", models / family, "--dataset", data / name, "--ba_m", 3, *options.split())
    assert verdict.status == 0, verdict.error
    assert contents(data / name) == before  # no cache files beside somebody's data
    out = tmp_path / "run"
    results = json.loads((out / "results.json").read_text())
    assert results["counters"]["unique_samples"] == 12
    assert results["counters"]["seen_instances"] == 36
    assert results["options"]["ba_m"] == 3
    state = load_file(out / "model.safetensors")
    was = load_file(models / family / "model.safetensors")
    assert any(not torch.equal(was[key], value) for key, value in state.items() if key in was)
    assert len(AutoTokenizer.from_pretrained(out)) == len(word_tokenizer())
    kind = {"classification": "accuracy", "seq2seq": "bleu", "causal": "perplexity"}[results["task"]]
    assert ("test" in results) == (name != "alone")
    if name != "alone":
        assert f"test_{kind}" in results["test"]
        assert f"{kind} {results['test'][f'test_{kind}']:.4g}" in verdict.stdout


def test_the_scores_are_those_of_independent_references(models, data, finetune, tmp_path):
    finetune(
        "--model",
        models / "bart",
        "--dataset",
        data / "pairs",
        "--num_beams",
        2,
        "--bleu_tokenize",
        "char",
        out="seq2seq",
    )
    results = json.loads((tmp_path / "seq2seq" / "results.json").read_text())["test"]
    rows = split(7, 2)
    hypotheses = (tmp_path / "seq2seq" / "hyp.test.txt").read_text().split("\n")[:-1]
    bleu = sacrebleu.metrics.BLEU(tokenize="char")
    assert len(hypotheses) == 7
    assert results["test_bleu"] == pytest.approx(bleu.corpus_score(hypotheses, [rows["target"]]).score)
    assert results["test_bleu_signature"] == str(bleu.get_signature())
    assert results["test_bleu_decoding"] == "beam 2, log-probability / L^0.6"
    finetune("--model", models / "gpt2", "--dataset", data / "texts", out="causal")
    results = json.loads((tmp_path / "causal" / "results.json").read_text())["test"]
    want = nats_per_token(tmp_path / "causal", rows["source"])
    assert results["test_nats_per_token"] == pytest.approx(want, rel=1e-5)
    assert results["test_perplexity"] == pytest.approx(math.exp(want), rel=1e-4)


@pytest.mark.trap(36)
def test_the_test_split_is_translated_with_the_prefix_by_the_search_that_is_named(data, finetune, tmp_path):
    model, tokenizer = copying_model("bart"), word_tokenizer()
    model.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    search = ["--num_beams", 3, "--length_penalty", 4.0, "--source_prefix", "w8 w9 ", "--learning_rate", 0]
    verdict = call_with(finetune, ["--model", tmp_path / "bart", "--dataset", data / "pairs"], search, "run")
    assert verdict.status == 0, verdict.error
    sources = split(7, 2)["source"]

    def translated(prefix="w8 w9 ", penalty=4.0, beams=3):
        lines = [prefix + source for source in sources]
        return translate(Accelerator(cpu=True), model, tokenizer, lines, decoding=Decoding(beams, penalty))

    want = translated()
    assert (tmp_path / "run" / "hyp.test.txt").read_text().split("\n")[:-1] == want
    assert want not in (translated(prefix=""), translated(penalty=0.6), translated(beams=1))
    test = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert test["test_bleu_decoding"] == "beam 3, log-probability / L^4.0"
    assert "beam 3, log-probability / L^4.0" in verdict.stdout


def test_training_and_validation_meet_the_prefix_too(models, data, finetune, tmp_path):
    rows = {name: datasets.load_from_disk(data / "pairs")[name].to_dict() for name in ("train", "validation")}
    for part in rows.values():
        part["source"] = ["w8 w9 " + source for source in part["source"]]
    DatasetDict({name: Dataset.from_dict(part) for name, part in rows.items()}).save_to_disk(tmp_path / "prefixed")
    argv = ["--model", models / "t5", "--dataset"]
    assert finetune(*argv, tmp_path / "prefixed", out="a").status == 0
    assert finetune(*argv, data / "pairs", "--source_prefix", "w8 w9 ", out="b").status == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    scores = [json.loads((tmp_path / name / "results.json").read_text())["validation"] for name in "ab"]
    assert scores[0]["eval_nats_per_token"] == scores[1]["eval_nats_per_token"]


@pytest.mark.parametrize("family", ["gpt2", "t5"])  # with and without a number of positions
def test_texts_are_cut_to_the_length_that_is_asked_for(family, models, data, finetune):
    name = "texts" if family == "gpt2" else "pairs"
    verdict = finetune("--model", models / family, "--dataset", data / name, "--max_length", 4)
    rows = zip(*(split(20, 0)[side] for side in ("source", "target")[: 1 + (family == "t5")]), strict=True)
    cut = sum(max(len(text.split()) + 1 for text in row) > 4 for row in rows)  # with eos
    assert 0 < cut < 20
    assert f"cut {cut} to 4 tokens" in verdict.stdout


def nats_per_token(folder, texts):
    """Of the GPT-2 in a run folder, each text by itself, without padding."""
    model, tokenizer = gpt2(), word_tokenizer()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    nats = targets = 0
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            scores = model.eval()(ids).logits[0, :-1].log_softmax(-1)
            nats -= float(scores.gather(1, ids[0, 1:, None]).sum())
            targets += ids.shape[1] - 1
    return nats / targets


TWO_RANKS = """
import runpy, sys
import torch
from bad_input import SCRIPTS
from distributed import report

main = runpy.run_path(str(SCRIPTS / "finetune.py"))["main"]
main()
report(torch.distributed.get_world_size())
"""


def test_two_ranks_train_and_score_together(models, data, tmp_path):
    options = ["--model", models / "gpt2", "--dataset", data / "texts", "--ba_m", 3, "--output_dir", tmp_path / "run"]
    assert run_ranks(TWO_RANKS, 2, args=[*map(str, options), *TRAINING]) == [2, 2]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["counters"]["unique_samples"], results["counters"]["seen_instances"]) == (24, 72)  # 3 x 2 x 4
    for name, seed in (("validation", 1), ("test", 2)):  # 6 and 7 rows, in batches of 5 a rank
        want = nats_per_token(tmp_path / "run", split(7 if name == "test" else 6, seed)["source"])
        found = next(value for key, value in results[name].items() if key.endswith("nats_per_token"))
        assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.trap(35)
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_decoder_has_its_decoder_inputs_under_label_smoothing_too(family, models, data, finetune, tmp_path):
    options = ["--label_smoothing_factor", 0.1, "--learning_rate", 0, "--max_steps", 1, "--dataloader_drop_last", True]
    argv = ["--model", models / family, "--dataset", data / "pairs"]
    verdict = call_with(finetune, argv, [*options, "--per_device_train_batch_size", 20], "run")
    assert verdict.status == 0, verdict.error


def test_the_accuracy_is_the_share_of_right_classes(models, data, finetune, tmp_path):
    finetune("--model", models / "bert", "--dataset", data / "classes", "--task", "classification")
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    right = 0
    with torch.no_grad():
        for n, text in enumerate(split(7, 2)["source"]):
            right += int(model(**word_tokenizer()(text, return_tensors="pt")).logits.argmax()) == n % 3
    assert results["test_accuracy"] == pytest.approx(right / 7)


def test_nats_of_a_row_do_not_see_its_padding():
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[1, 2, -100, -100], [3, 4, 0, 2]])
    want = [-logits[n, :t].log_softmax(-1).gather(1, labels[n, :t, None]).sum() for n, t in ((0, 2), (1, 4))]
    got = token_nats_per_row((logits, "cache"), labels, is_causal=False)
    torch.testing.assert_close(got, torch.stack([torch.stack(want), torch.tensor([2.0, 4.0])], dim=1))


# ---- data


def test_ids_are_the_tokenizers_and_what_is_cut_or_left_out_is_counted():
    rows = Dataset.from_dict({"source": ["w3 w4", "w5 w6 w7 w8", " ", "w9"], "target": ["w4", "w4", "w4", None]})
    encoded, counts = encode(rows, "seq2seq", word_tokenizer(), max_length=4, source_prefix="w10 ")
    assert encoded["input_ids"] == [[10, 3, 4, 1], [10, 5, 6, 1]]
    assert encoded["labels"] == [[4, 1], [4, 1]]
    assert counts == {"cut": 1, "blank": 2, "marked": 0}


def test_a_causal_text_ends_where_it_ended():
    tokenizer = word_tokenizer()
    tokenizer._tokenizer.post_processor = None  # most causal tokenizers add no end
    rows = Dataset.from_dict({"text": ["w3 w4", "w5 w6 w7 w8", "w5 w6 w7"]})
    encoded, counts = encode(rows, "causal", tokenizer, max_length=3)
    assert encoded["input_ids"] == encoded["labels"] == [[3, 4, 1], [5, 6, 7], [5, 6, 7]]
    assert counts["cut"] == 1


def test_rows_without_a_label_are_left_out_and_a_split_of_them_is_no_test(models, finetune, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = {"text": sentences(9), "label": [0, 1, -1] * 3}
    made = {"train": rows, "validation": rows, "test": rows | {"label": [-1] * 9}}
    DatasetDict({k: Dataset.from_dict(x, features=features) for k, x in made.items()}).save_to_disk(tmp_path / "glue")
    verdict = finetune("--model", models / "bert", "--dataset", tmp_path / "glue", "--task", "classification")
    assert "train split: dropped 3 of 9 rows without a label" in verdict.stdout
    assert "test split: dropped 9 of 9 rows without a label" in verdict.stdout
    assert "no test split: nothing was tested" in verdict.stdout


def test_a_held_out_part_is_neither_trained_on_nor_moved_by_the_run(models, data, finetune):
    verdict = finetune("--model", models / "gpt2", "--dataset", data / "alone", "--valid_share", 0.2)
    assert "4 of the 20 training rows are held out" in verdict.stdout
    assert "train: 16 samples" in verdict.stdout


@pytest.mark.parametrize("task", ["seq2seq", "causal", "classification"])
def test_with_nothing_named_a_small_model_learns_the_generated_text(task, finetune, tmp_path, monkeypatch):
    monkeypatch.setattr(generated, "generate_corpus", lambda: generate_corpus(train=600, valid=20, test=6))
    monkeypatch.setattr(generated, "_VOCAB_SIZE", 600)
    verdict = finetune("--task", task, "--ba_m", 2, "--cache_dir", tmp_path / "cache", "--max_length", 12)
    assert verdict.status == 0, verdict.error
    assert "training on the built-in generated text" in verdict.stdout
    assert json.loads((tmp_path / "run" / "results.json").read_text())["task"] == task


def test_the_generated_classes_cannot_be_told_by_the_last_character():
    rows = generate_data("classification")["train"]
    assert set(rows["label"]) == {0, 1}
    assert not any(text.endswith((".", "?")) for text in rows["text"])


# ---- the run


def test_the_defaults_of_transformers_stay_for_a_model_that_is_named(tmp_path):
    _, _, args = parse_finetuning(["--model", "m", "--dataset", "d", "--use_cpu", "true"])
    assert (args.learning_rate, args.num_train_epochs, args.max_steps) == (5e-5, 3, -1)
    assert args.output_dir == "runs/finetune-m-d-m1-seed42"


@pytest.mark.parametrize(("options", "default"), [("", "0.002"), ("--model m", "5e-05")])
def test_help_shows_the_defaults_of_what_is_named(options, default, capsys):
    with pytest.raises(SystemExit):
        parse_finetuning([*options.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"The initial learning rate for the optimizer. (default: {default})" in shown


def test_a_folder_named_like_a_format_is_that_folder_and_a_format_alone_is_refused(data, monkeypatch):
    (data / "json").mkdir(exist_ok=True)
    (data / "json" / "train.jsonl").write_text('{"text": "a dog"}\n')
    monkeypatch.chdir(data)
    assert load_data_set("json")["train"]["text"] == ["a dog"]
    with pytest.raises(DataError, match="parquet is no folder here, and names a file format"):
        load_data_set("parquet")


def test_epochs_that_are_asked_for_are_not_overruled(tmp_path):
    _, _, args = parse_finetuning(["--num_train_epochs", "7", "--use_cpu", "true"])
    assert (args.num_train_epochs, args.max_steps) == (7, -1)
    assert parse_finetuning(["--use_cpu", "true"])[2].max_steps == 400


# ---- what a model folder holds


def test_half_precision_weights_are_trained_in_float32(models, data, finetune, tmp_path):
    gpt2().half().save_pretrained(tmp_path / "half")
    word_tokenizer().save_pretrained(tmp_path / "half")
    finetune("--model", tmp_path / "half", "--dataset", data / "texts")
    state = load_file(tmp_path / "run" / "model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32}


def saved_classifier(folder, names, **more):
    config = bert().config
    config.num_labels, config.id2label = len(names), dict(enumerate(names))
    for name, value in more.items():
        setattr(config, name, value)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


def test_a_trained_heads_classes_keep_their_numbers(data, finetune, tmp_path):
    model = saved_classifier(tmp_path / "zk", ["z", "k"], problem_type="multi_label_classification")
    options = ["--text_column", "a", "--label_column", "kind", "--learning_rate", 0]
    verdict = call_with(finetune, ["--model", tmp_path / "zk", "--dataset", data / "named"], options, "run")
    assert verdict.status == 0, verdict.error
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    rows, right = split(7, 2)["source"], 0
    with torch.no_grad():
        for n, text in enumerate(rows):  # sorted, k would be class 0
            right += int(model.eval()(**word_tokenizer()(text, return_tensors="pt")).logits.argmax()) == 1 - n % 2
    assert results["test_accuracy"] == pytest.approx(right / 7)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.id2label == {0: "z", 1: "k"}


def test_a_head_that_is_kept_under_other_names_is_said(data, finetune, tmp_path):
    saved_classifier(tmp_path / "other", ["p", "q"])
    options = ["--text_column", "a", "--label_column", "kind"]
    verdict = finetune("--model", tmp_path / "other", "--dataset", data / "named", *options)
    assert "the trained head's classes p, q are k, z from here on" in verdict.stdout


def test_a_masked_language_model_becomes_a_classifier(data, finetune, tmp_path):
    BertForMaskedLM(bert().config).save_pretrained(tmp_path / "mlm")
    word_tokenizer().save_pretrained(tmp_path / "mlm")
    verdict = finetune("--model", tmp_path / "mlm", "--dataset", data / "classes", "--task", "classification")
    assert verdict.status == 0, verdict.error
    assert "bert.pooler.dense.weight" in verdict.stdout


def test_the_weights_of_a_new_head_follow_the_seed(models, data, finetune, tmp_path):
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ["--seed", seed, "--learning_rate", 0, "--max_steps", 1]
        argv = ["--model", models / "gpt2", "--dataset", data / "classes", "--task", "classification"]
        verdict = call_with(finetune, argv, options, name)
        assert verdict.status == 0, verdict.error
        found[name] = load_file(tmp_path / name / "model.safetensors")["score.weight"]
    assert torch.equal(found["a"], found["b"])
    assert not torch.equal(found["a"], found["c"])


def test_texts_are_cut_to_the_positions_that_a_model_of_robertas_kind_can_use(finetune, tmp_path):
    config = RobertaConfig(**TINY, vocab_size=61, max_position_embeddings=12, pad_token_id=0, num_labels=2)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    word_tokenizer().save_pretrained(tmp_path / "roberta")
    rows = Dataset.from_dict({"text": [" ".join(f"w{n}" for n in range(3, 33))] * 4, "label": [0, 1, 0, 1]})
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "long")
    verdict = finetune("--model", tmp_path / "roberta", "--dataset", tmp_path / "long")
    assert verdict.status == 0, verdict.error
    assert "cut 4 to 11 tokens" in verdict.stdout


def test_a_text_of_one_token_has_no_target_and_is_counted():
    tokenizer = word_tokenizer()
    tokenizer._tokenizer.post_processor = None
    tokenizer.eos_token = None
    rows = Dataset.from_dict({"text": ["w3", "w3 w4"]})
    encoded, counts = encode(rows, "causal", tokenizer, max_length=3)
    assert encoded["input_ids"] == [[3, 4]]
    assert counts["short"] == 1


def test_a_test_split_whose_numbered_labels_are_secret_is_no_test(models, finetune, tmp_path):
    rows = {"text": sentences(6), "label": [0, 1] * 3}
    made = {"train": rows, "validation": rows, "test": rows | {"label": [-1] * 6}}
    DatasetDict({k: Dataset.from_dict(x) for k, x in made.items()}).save_to_disk(tmp_path / "secret")
    verdict = finetune("--model", models / "bert", "--dataset", tmp_path / "secret")
    assert verdict.status == 0, verdict.error
    assert "test split: dropped 6 of 6 rows without a label" in verdict.stdout


@pytest.mark.parametrize(
    ("labels", "known", "numbers", "classes"),
    [
        (list(range(11)), (), list(range(11)), [str(n) for n in range(11)]),  # 10 is no neighbour of 1
        ([0, 1, 2], ("x", "y", "z"), [0, 1, 2], ["x", "y", "z"]),
        ([3, 7, 3], (), [0, 1, 0], ["3", "7"]),
        (["a", "A", "a"], ("a", "A"), [0, 1, 0], ["a", "A"]),  # sorted, A would be class 0
        ([True, False, True], (), [1, 0, 1], ["False", "True"]),
        (["k", "z", "k"], ("q", "p"), [0, 1, 0], ["k", "z"]),
        ([0, 1, 0], ("1", "0"), [1, 0, 1], ["1", "0"]),
        (["1", "0", "1"], ("no", "yes"), [1, 0, 1], ["no", "yes"]),
        ([None, "z", "k"], ("z", "k"), [0, 1], ["z", "k"]),
    ],
)
@pytest.mark.parametrize("is_encoded", [False, True])
def test_classes_are_numbered_by_their_order_or_as_the_head_has_them(
    labels, known, numbers, classes, is_encoded, tmp_path
):
    rows = Dataset.from_dict({"text": ["w3"] * len(labels), "label": labels})
    if is_encoded:
        order = [str(label) for label in sorted({*labels} - {None})]
        encoded = [None if label is None else order.index(str(label)) for label in labels]
        features = Features({"text": Value("string"), "label": ClassLabel(names=order)})
        rows = Dataset.from_dict({"text": rows["text"], "label": encoded}, features=features)
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "data")
    config = FinetuningConfig(model="m", dataset=str(tmp_path / "data"))
    splits, found = load_splits(config, "classification", 0, known_classes=known)
    assert (splits["train"]["label"][:], list(found)) == (numbers, classes)
    assert splits["validation"]["label"][:] == numbers


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """An M2M100 with its own kind of tokenizer: languages are tokens."""
    root = tmp_path_factory.mktemp("m2m")
    folder = train_tokenizer(generate_corpus(train=300, valid=1, test=1)["train"], 400, root)
    vocab = json.loads((folder / "vocab.json").read_text())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [piece for piece in vocab if piece not in special]
    (root / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate([*special, *pieces])}))
    tokenizer = M2M100Tokenizer(str(root / "vocab.json"), str(folder / "source.spm"))
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    size = 1 + max(tokenizer.lang_code_to_id.values())
    M2M100ForConditionalGeneration(M2M100Config(vocab_size=size, **small)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model"


def test_a_multilingual_model_is_told_its_languages(multilingual, finetune, tmp_path):
    text = generate_corpus(train=8, valid=4, test=3)
    splits = {name: Dataset.from_dict({"source": x.source, "target": x.target}) for name, x in text.items()}
    DatasetDict(splits).save_to_disk(tmp_path / "text")
    common = ["--model", multilingual, "--dataset", tmp_path / "text"]
    assert "is multilingual: name the two languages by --source_code and --target_code" in finetune(*common).error
    unknown = finetune(*common, "--source_code", "en", "--target_code", "xx")
    assert "knows no language 'xx'" in unknown.error
    verdict = finetune(*common, "--source_code", "en", "--target_code", "de", out="de")
    assert verdict.status == 0, verdict.error
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "de")
    settings = json.loads((tmp_path / "de" / "generation_config.json").read_text())
    assert settings["forced_bos_token_id"] == tokenizer.get_lang_id("de") != tokenizer.get_lang_id("en")


def test_a_translation_begins_with_the_language_that_was_asked_for(multilingual, monkeypatch, capsys, tmp_path):
    for name in ("en", "de"):
        (tmp_path / f"test.{name}").write_text("Maria must work.\n")
    common = ["--model", multilingual, "--test-prefix", tmp_path / "test", "--num-beams", 1, "--cpu"]
    verdict = call("eval_bleu.py", common, monkeypatch, capsys)
    assert "is multilingual" in verdict.error
    begun = []
    generate = M2M100ForConditionalGeneration.generate

    def spy(self, *args, **kwargs):
        output = generate(self, *args, **kwargs)
        begun.append((kwargs["input_ids"][0, 0].item(), output[0, 1].item()))
        return output

    monkeypatch.setattr(M2M100ForConditionalGeneration, "generate", spy)
    verdict = call("eval_bleu.py", [*common, "--source-code", "en", "--target-code", "de"], monkeypatch, capsys)
    assert verdict.status == 0, verdict.error
    tokenizer = AutoTokenizer.from_pretrained(multilingual)
    assert begun == [(tokenizer.get_lang_id("en"), tokenizer.get_lang_id("de"))]


# ---- bad input: one line, before anything is trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ba_m 0", "--ba-m must be a whole number of at least 1, got 0"),
        ("--ba_m 2 --copies_per_pass 3", "--copies-per-pass must be auto or from 1 to --ba-m 2, got 3"),
        ("--task translation", "--task must be one of seq2seq, causal, classification, got translation"),
        ("--max_length 1", "--max_length must be at least 2, got 1"),
        ("--valid_share 1", "--valid_share must be above 0 and below 1, got 1.0"),
        ("--num_beam 2", "unknown option --num_beam 2"),
        ("--source_column a --model x --dataset y", "give both, or neither"),
        ("--dataset {data}/texts", "--dataset needs --model"),
        ("--model {data}/nowhere --dataset {data}/texts", "there is no such folder"),
        ("--model {models}/gpt2 --dataset {data}/nowhere", "cannot load .*nowhere"),
        ("--model {models}/gpt2 --dataset {data}/texts --task seq2seq", "needs an encoder-decoder"),
        ("--model {models}/bart --dataset {data}/texts --task causal", "is an encoder-decoder"),
        ("--model {models}/bart --dataset {data}/texts", "has the columns text: name the two sides by --source_column"),
        ("--model {models}/bart --dataset {data}/wmt", "has the languages en, de; --source_lang is not given"),
        ("--model {models}/t5 --dataset {data}/wmt --source_lang en --target_lang fr", "--target_lang is 'fr'"),
        ("--model {models}/gpt2 --dataset {data}/pairs", "name the text by --text_column"),
        (
            "--model {models}/gpt2 --dataset {data}/texts --text_column t",
            "the train split has no column 't'; it has te",
        ),
        (
            "--model {models}/gpt2 --dataset {data}/renamed --text_column id",
            "the column 'id' of the train split holds no",
        ),
        ("--model {models}/bert --dataset {data}/texts --task classification", "has no column 'label'"),
        (
            "--model {models}/bert --dataset {data}/named --task classification --text_column a --label_column b",
            "validation split has the label .* which the train split has not",
        ),
        ("--ba_m 2 --resume_from_checkpoint {data}", "is no whole checkpoint of a Trainer"),
        (
            "--model {models}/bert --dataset {data}/texts --task causal",
            "is an encoder .bert., which would see the",
        ),
        ("--model {models}/bart --dataset {data}/renamed --source_column id --target_column id", "are both id"),
        ("--model {models}/bart --dataset {data}/pairs --source_code en_XX", "knows no languages; leave them out"),
        (
            "--model {models}/gpt2 --dataset {data}/texts --source_code xx",
            "--source_code is an option of seq2seq, and the task is causal: leave it out",
        ),
        (
            "--model {models}/bert --dataset {data}/classes --task classification --num_beams 2",
            "--num_beams is an option of seq2seq, and",
        ),
        ("--text_column a", "--text_column is an option of causal and classification, and the task is seq2seq"),
        ("--length_penalty nan", "--length_penalty must be finite, got nan"),
        ("--fp16 true", "--fp16 needs an accelerator, and this run is on cpu"),
        ("--do_eval true", "always trains and then evaluates"),
        ("--report_to wandb", "(?i)wandb"),
        ("--model {models}/gpt2 --dataset {data}/files/test-00000-of-00001.parquet", "is a file; give its folder"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_training(options, message, models, data, finetune, tmp_path):
    verdict = finetune(*options.format(models=models, data=data).split())
    assert verdict.status == 1
    assert verdict.error.startswith("error: ")
    assert "\n" not in verdict.error
    assert re.search(message, verdict.error), verdict.error
    assert not (tmp_path / "run" / "results.json").exists()


def test_identical_copies_are_refused_with_the_table(models, data, finetune, tmp_path):
    gpt2(dropout=0.0).save_pretrained(tmp_path / "still")
    word_tokenizer().save_pretrained(tmp_path / "still")
    common = ["--model", tmp_path / "still", "--dataset", data / "texts", "--ba_m", 2]
    verdict = finetune(*common)
    assert "inactive (p=0)" in verdict.error
    assert verdict.error.split("\n")[-1].startswith(
        "error: identical copies are refused; give --dropout above 0, --lora_r with"
    )
    assert finetune(*common, "--allow_identical_copies", "true").status == 0  # nothing is in the way


def test_what_the_first_batch_shows_is_refused_in_one_line_too(models, data, finetune, tmp_path):
    mixtral().save_pretrained(tmp_path / "experts")
    word_tokenizer().save_pretrained(tmp_path / "experts")
    common = ["--model", tmp_path / "experts", "--dataset", data / "texts", "--ba_m", 3]
    verdict = finetune(*common, "--copies_per_pass", 2)
    assert verdict.error.startswith("error: a part of the loss does not divide by num_items_in_batch")
    assert verdict.error.endswith("but copies_per_pass is 2; set copies_per_pass=3")
    assert "\n" not in verdict.error
    assert finetune(*common).status == 0


def test_a_draw_without_a_stream_is_refused_in_one_line(models, data, finetune, monkeypatch):
    monkeypatch.setattr(GPT2LMHeadModel, "forward", with_a_permutation(GPT2LMHeadModel.forward))
    common = ["--model", models / "gpt2", "--dataset", data / "texts", "--ba_m", 2]
    verdict = finetune(*common, "--reproducible_copies", "true")
    assert re.match("error: .*randperm.* train without reproducible copies$", verdict.error), verdict.error


def with_a_permutation(forward):
    @functools.wraps(forward)
    def drawn(self, input_ids, **kwargs):
        if self.training:
            torch.randperm(len(input_ids))
        return forward(self, input_ids, **kwargs)

    return drawn


def test_a_head_for_other_classes_is_made_anew_and_said(models, data, finetune, tmp_path):
    other = bert().config
    other.num_labels = 5
    model = AutoModelForSequenceClassification.from_config(other)
    model.save_pretrained(tmp_path / "five")
    word_tokenizer().save_pretrained(tmp_path / "five")
    verdict = finetune("--model", tmp_path / "five", "--dataset", data / "classes")
    assert "2 weights are new: classifier.bias, classifier.weight" in verdict.stdout
    assert load_file(tmp_path / "run" / "model.safetensors")["classifier.weight"].shape[0] == 3


def test_a_model_without_its_inner_weights_is_refused(models, data, finetune, tmp_path):
    shutil.copytree(models / "bert", tmp_path / "less")
    state = load_file(tmp_path / "less" / "model.safetensors")
    lost = min(key for key in state if "attention" in key)
    save_file({k: x for k, x in state.items() if k != lost}, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    verdict = finetune("--model", tmp_path / "less", "--dataset", data / "classes")
    assert f"lacks 1 of its weights ({lost} ...)" in verdict.error


def test_numbers_are_no_classes(models, finetune, tmp_path):
    rows = Dataset.from_dict({"text": sentences(4), "label": [0.1, 0.2, 0.3, 0.4]})
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "floats")
    verdict = finetune("--model", models / "bert", "--dataset", tmp_path / "floats")
    assert "'label' has 4 different values of Value('float64'), which are no classes" in verdict.error


def test_a_data_set_without_a_training_split_is_named(models, finetune, tmp_path):
    DatasetDict({"test": Dataset.from_dict({"text": ["w3"]})}).save_to_disk(tmp_path / "test_only")
    verdict = finetune("--model", models / "gpt2", "--dataset", tmp_path / "test_only")
    assert "has the splits test; training needs 'train'" in verdict.error


def test_no_cache_stays_off_afterwards():
    from tasks.text.data_sets import without_cache_files

    with without_cache_files():
        assert not datasets.is_caching_enabled()
    assert datasets.is_caching_enabled()
