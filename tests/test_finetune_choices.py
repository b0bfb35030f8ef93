"""scripts/finetune.py: dropout, LoRA, chats, special tokens, what is reported, and bad input that came late before."""

import json
import re

import matplotlib.image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.trainer_callback import TrainerState

from finetuning_runs import call_with, data, finetune, models
from tasks.finetuning.encoding import encode
from tasks.text.encoding import special_as_text
from tiny_models import bart, gpt2
from word_tokenizer import sentences, word_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> w9 {% endfor %}"


def save(folder, **splits):
    DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()}).save_to_disk(folder)


def results_of(tmp_path, name="run"):
    return json.loads((tmp_path / name / "results.json").read_text())


# ---- dropout and LoRA


def test_dropout_is_set_in_every_place_of_a_model_that_has_none(data, finetune, tmp_path):
    gpt2(dropout=0.0).save_pretrained(tmp_path / "still")
    word_tokenizer().save_pretrained(tmp_path / "still")
    common = ["--model", tmp_path / "still", "--dataset", data / "texts", "--ba_m", 3]
    assert "identical copies are refused" in finetune(*common).error
    verdict = finetune(*common, "--dropout", "0.25")
    assert verdict.status == 0, verdict.error
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {0.25}
    assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.embd_pdrop) == (0.25, 0.25, 0.25)
    assert "| dropout | 0.25 |" in (tmp_path / "run" / "README.md").read_text()


PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it


@PEFT
def test_lora_trains_its_matrices_alone_and_leaves_one_merged_model(models, data, finetune, tmp_path):
    verdict = call_with(
        finetune,
        ["--model", models / "llama", "--dataset", data / "classes", "--task", "classification", "--ba_m", 3],
        ["--lora_r", 2, "--lora_dropout", 0.5, "--learning_rate", 0.5],
        "run",
    )
    assert verdict.status == 0, verdict.error
    matrices = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "llama", tmp_path / "run"))
    name = "model.layers.0.self_attn.q_proj"
    a, b = (matrices[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    assert b.abs().max() > 0
    want = before[f"{name}.weight"].double() + 16 / 2 * b @ a  # Hu et al. 2022, section 4.1: alpha / r
    torch.testing.assert_close(after[f"{name}.weight"].double(), want, atol=1e-6, rtol=1e-5)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    right = 0
    with torch.no_grad():
        for n, text in enumerate(sentences(7, longest=7, seed=2)):
            right += int(model(**word_tokenizer()(text, return_tensors="pt")).logits.argmax()) == n % 3
    assert results_of(tmp_path)["test"]["test_accuracy"] == pytest.approx(right / 7)


@PEFT
def test_a_resumed_lora_run_is_the_undisturbed_one(models, data, finetune, tmp_path):
    common = ["--model", models / "gpt2", "--dataset", data / "texts", "--ba_m", 2, "--lora_r", 2]
    assert finetune(*common, "--resume_from_checkpoint", "last", out="whole").status == 0
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    verdict = finetune(*common, "--resume_from_checkpoint", "last", out="parts")
    assert verdict.status == 0, verdict.error
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


# ---- texts


def unigram_tokenizer():
    """As T5's: the special tokens are pieces of the model."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{letter}" for letter in "ab"), *"▁</s>ab "]
    pieces = [(piece, -float(n)) for n, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(tokenizer_models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def byte_tokenizer():
    """As BART's: the special tokens are added to the pieces."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a b"], vocab_size=300, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("make", [unigram_tokenizer, byte_tokenizer, word_tokenizer])
def test_special_tokens_in_a_text_are_text_unless_they_are_asked_for(make):
    tokenizer = make()
    rows = Dataset.from_dict({"text": ["a </s> b", "a</s>", "a b"], "label": [0, 1, 0]})
    encoded, counts = encode(rows, "classification", tokenizer, 64)
    assert counts["marked"] == 2
    for ids in encoded["input_ids"]:
        assert [n for n, token in enumerate(ids) if token in (tokenizer.eos_token_id, tokenizer.pad_token_id)] == [
            len(ids) - 1
        ]
    parsed, counts = encode(rows, "classification", tokenizer, 64, parse_special_tokens=True)
    assert parsed["input_ids"] == tokenizer(rows["text"][:])["input_ids"]
    assert parsed["input_ids"][0].count(tokenizer.eos_token_id) == 2
    assert not counts["marked"]


def test_a_text_that_needs_no_change_is_not_changed():
    texts = ["a </s> b", "a <b> & <pad"]
    assert special_as_text(byte_tokenizer(), texts) == (texts, 1)
    assert special_as_text(unigram_tokenizer(), texts) == (["a < /s> b", "a <b> & <pad"], 1)
    assert special_as_text(byte_tokenizer(), []) == ([], 0)


def test_a_bart_classifier_trains_on_text_with_its_end_token(finetune, tmp_path):
    bart().save_pretrained(tmp_path / "bart")
    word_tokenizer().save_pretrained(tmp_path / "bart")
    texts = [f"{text} </s> w3" if n % 3 else text for n, text in enumerate(sentences(12, longest=5, seed=0))]
    save(tmp_path / "marked", train={"text": texts, "label": [n % 2 for n in range(12)]})
    verdict = finetune("--model", tmp_path / "bart", "--dataset", tmp_path / "marked", "--task", "classification")
    assert verdict.status == 0, verdict.error
    assert "hold special tokens, read as text" in verdict.stdout


@pytest.mark.parametrize("task", ["seq2seq", "causal", "classification"])
def test_texts_without_a_token_are_dropped_and_counted(task):
    tokenizer = byte_tokenizer()
    normalizer = normalizers.Replace("\u200b", "")
    tokenizer._tokenizer.normalizer = normalizer
    if task == "causal":
        tokenizer._tokenizer.post_processor = None
    columns = {
        "seq2seq": {"source": ["a b", "\u200b", "b"], "target": ["a", "a", "\u200b\u200b"]},
        "causal": {"text": ["\u200b", "a b", "\u200b\u200b"]},
        "classification": {"text": ["\u200b", "\u200b", "a b"], "label": [0, 1, 0]},
    }[task]
    encoded, counts = encode(Dataset.from_dict(columns), task, tokenizer, 64)
    assert (len(encoded), counts["blank"]) == (1, 2)


def test_a_chat_is_written_by_the_tokenizers_template(models, finetune, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [
        [{"role": "w3", "content": question}, {"role": "w4", "content": answer}]
        for question, answer in zip(sentences(12, longest=4, seed=0), sentences(12, longest=4, seed=1), strict=True)
    ]
    rows = Dataset.from_dict({"text": [*chats, []]})
    encoded, counts = encode(rows, "causal", tokenizer, 64)
    want = [tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
            for chat in chats]  # fmt: skip
    assert encoded["input_ids"] == encoded["labels"] == want
    assert want[0].count(tokenizer.eos_token_id) == 2
    assert counts["blank"] == 1

    save(tmp_path / "chats", train={"messages": chats, "score": list(range(12))})
    common = ["--model", tmp_path / "model", "--dataset", tmp_path / "chats"]
    gpt2().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    assert "has no chat template: give one" in finetune(*common).error
    tokenizer.save_pretrained(tmp_path / "model")
    verdict = finetune(*common, out="chat")
    assert verdict.status == 0, verdict.error

    tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    tokenizer.save_pretrained(tmp_path / "model")
    assert "template refuses a chat (roles must take turns)" in finetune(*common, out="turns").error


# ---- what is reported


@pytest.mark.parametrize(("family", "name", "loader"), [
    ("gpt2", "texts", "AutoModelForCausalLM"),
    ("bart", "pairs", "AutoModelForSeq2SeqLM"),
    ("bert", "classes", "AutoModelForSequenceClassification"),
])  # fmt: skip
def test_a_run_leaves_a_curve_and_a_card_whose_code_runs(family, name, loader, models, data, finetune, tmp_path):
    task = ["--task", "classification"] if name == "classes" else []
    named = ["--model", models / family, "--dataset", data / name, "--ba_m", 3, *task]
    verdict = call_with(finetune, named, ["--eval_strategy", "steps", "--eval_steps", 2], "run")
    assert verdict.status == 0, verdict.error
    assert matplotlib.image.imread(tmp_path / "run" / "curve.png").std() > 0.05
    card = (tmp_path / "run" / "README.md").read_text()
    for said in (
        f"| base model | {models / family} |",
        f"| data | {data / name} |",
        "| updates | 3 |",
        "M | 3 (",
        "torch ",
    ):
        assert said in card
    figure = next(x for x in results_of(tmp_path)["test"] if x.endswith(("nats_per_token", "accuracy")))
    assert f"- test: {figure.removeprefix('test_')} {results_of(tmp_path)['test'][figure]:.4g}" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert loader in code
    exec(code.replace('"run"', repr(str(tmp_path / "run"))), {})


def test_the_best_checkpoint_by_perplexity_is_the_one_with_the_lowest(models, data, finetune, tmp_path):
    best = "--metric_for_best_model perplexity --load_best_model_at_end true --eval_strategy steps --eval_steps 1"
    verdict = call_with(
        finetune,
        ["--model", models / "gpt2", "--dataset", data / "texts"],
        [*best.split(), "--save_steps", 1, "--max_steps", 5, "--learning_rate", 0.3],
        "run",
    )
    assert verdict.status == 0, verdict.error
    state = TrainerState.load_from_json(tmp_path / "run" / "checkpoint-5" / "trainer_state.json")
    values = [row["eval_perplexity"] for row in state.log_history if "eval_perplexity" in row]
    assert len(set(values)) > 2
    assert results_of(tmp_path)["validation"]["eval_perplexity"] == pytest.approx(min(values), rel=1e-5)


def test_a_finished_run_that_is_resumed_does_no_other_update(models, data, finetune, tmp_path):
    common = ["--model", models / "gpt2", "--dataset", data / "texts", "--ba_m", 2]
    assert call_with(finetune, common, ["--max_steps", 3], "run").status == 0
    want = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "model.safetensors").unlink()
    resumed = [*common, "--resume_from_checkpoint", "last"]
    verdict = call_with(finetune, resumed, ["--max_steps", 3], "run")
    assert verdict.status == 0, verdict.error
    got = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert results_of(tmp_path)["counters"]["unique_samples"] == 12


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--per_device_train_batch_size 0", "--per-device-train-batch-size must be at least 1, got 0"),
        ("--per_device_eval_batch_size -1", "--per-device-eval-batch-size must be at least 1, got -1"),
        ("--gradient_accumulation_steps 0", "--gradient-accumulation-steps must be at least 1, got 0"),
        ("--eval_accumulation_steps 0", "--eval-accumulation-steps must be at least 1, got 0"),
        ("--dataloader_num_workers -1", "--dataloader-num-workers must be at least 0, got -1"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--max_steps -1 --num_train_epochs 0", "--num_train_epochs must be above 0 without --max_steps, got 0.0"),
        ("--label_smoothing_factor 1", "--label_smoothing_factor must be from 0 to below 1, got 1.0"),
        ("--label_names x", "--label_names cannot be used: this script sets it by the task; leave it out"),
        ("--batch_eval_metrics true", "--batch_eval_metrics cannot be used"),
        ("--eval_do_concat_batches false", "--eval_do_concat_batches cannot be used"),
        ("--prediction_loss_only true", "--prediction_loss_only cannot be used"),
        (
            "--metric_for_best_model bleu --eval_strategy steps",
            "--metric_for_best_model must be one of loss, perplexity, nats_per_token for causal, got bleu",
        ),
        ("--fp16 true", "--fp16 needs an accelerator, and this run is on cpu; take --bf16 true or neither"),
        ("--dropout 1", "--dropout is a probability, from 0 to below 1, got 1.0"),
        ("--lora_r 0", "--lora-r must be at least 1, got 0"),
        ("--lora_r 2 --lora_dropout nan", "--lora-dropout is a probability, from 0 to below 1, got nan"),
    ],
)
def test_options_are_refused_before_training(options, message, models, data, finetune, tmp_path):
    verdict = call_with(finetune, ["--model", models / "gpt2", "--dataset", data / "texts"], options.split(), "run")
    assert verdict.status == 1
    assert verdict.error.startswith(f"error: {message}"), verdict.error
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_bf16_trains_on_the_processor_as_the_message_says(models, data, finetune):
    named = ["--model", models / "gpt2", "--dataset", data / "texts"]
    assert call_with(finetune, named, ["--bf16", "true"], "run").status == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [[0], [1]] * 4},
            "the column 'label' of the train split holds List(Value('int64')), and a text has one",
        ),
        (
            {"label": [{"a": 1}, {"a": 2}] * 4},
            "the column 'label' of the train split holds {{'a': Value('int64')}}, and a",
        ),
        ({"label": ["", " "] * 4}, "the train split of {folder} is empty|has 0 different values"),
    ],
)
def test_labels_that_are_no_classes_are_refused(columns, message, models, finetune, tmp_path):
    save(tmp_path / "odd", train={"text": sentences(8, longest=4, seed=0), **columns})
    named = ["--model", models / "bert", "--dataset", tmp_path / "odd", "--task", "classification"]
    verdict = finetune(*named)
    assert verdict.status == 1
    assert any(said.format(folder=tmp_path / "odd") in verdict.error for said in message.split("|")), verdict.error


# datasets 4.7 leaves the files of a CSV open
OPEN_FILES = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@OPEN_FILES
@pytest.mark.parametrize("kind", ["words", "numbers"])
def test_rows_with_a_blank_class_are_left_out_and_counted(kind, models, finetune, tmp_path):
    names = {"words": ("no", "yes"), "numbers": ("0", "1")}[kind]
    lines = [f"{text},{names[n % 2] if n % 4 else ''}" for n, text in enumerate(sentences(16, longest=4, seed=0))]
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("\n".join(["text,label", *lines]))
    verdict = finetune("--model", models / "bert", "--dataset", tmp_path / "csv", "--task", "classification")
    assert verdict.status == 0, verdict.error
    assert "train split: dropped 4 of 16 rows without a label" in verdict.stdout
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert saved.config.id2label == dict(enumerate(names))


@OPEN_FILES
def test_a_file_with_another_separator_is_named_with_its_cause(models, finetune, tmp_path):
    for name, text in (
        ("semicolon", "text;label\nw3 w4;0\nw5;1\n"),
        ("ragged", "text;label\nw3 w4;0\nw5, w6;1\nw, x, y;0\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(text)
    common = ["--model", models / "bert", "--task", "classification", "--dataset"]
    error = finetune(*common, tmp_path / "semicolon").error
    assert "has one column, 'text;label': is it a CSV whose separator is ';'?" in error
    error = finetune(*common, tmp_path / "ragged").error
    assert re.search(r"cannot load .*ragged: .*Expected 1 fields in line 3, saw 2", error), error


def test_a_decoder_without_a_start_token_is_refused(data, finetune, tmp_path):
    model = bart()
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = settings.bos_token_id = None
    model.save_pretrained(tmp_path / "bart")
    word_tokenizer().save_pretrained(tmp_path / "bart")
    error = finetune("--model", tmp_path / "bart", "--dataset", data / "pairs").error
    assert "has no token that a decoder begins with; set decoder_start_token_id in its config.json" in error


def test_a_model_without_dropout_settings_is_named(models, data, finetune, monkeypatch):
    monkeypatch.setattr("tasks.finetuning.model.vars", lambda part: {}, raising=False)
    error = finetune("--model", models / "gpt2", "--dataset", data / "texts", "--dropout", "0.1").error
    assert "--dropout: the gpt2 of --model" in error
    assert "has none to set" in error
