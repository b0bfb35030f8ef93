import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from accelerate import Accelerator
from transformers import AutoModelForSeq2SeqLM

from seqba import BatchAugmentationArguments
from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions
from tasks.cli.options import flag
from tasks.decoding.search import Decoding, translate
from tasks.models.folder import save_model_folder
from tasks.models.transformer import build_model
from tasks.run.options import RunOptions
from tasks.scoring.bleu import score_bleu
from tasks.text.generated.corpus import generate_corpus
from tasks.text.tokenizer import load_tokenizer, train_tokenizer
from tasks.translation.config import PRESETS, TranslationConfig, may_differ, parse_config, run_folder
from tasks.translation.model import TranslationLoss, count_parameters, decoding_config
from tasks.translation.result import USAGE
from tasks.translation.train import describe_training, learning_rate

SMALL = {
    "width": 24, "ffn_width": 40, "num_layers": 2, "num_heads": 4, "dropout": 0.1, "attention_dropout": 0.2,
    "activation_dropout": 0.3, "pad_token_id": 0, "eos_token_id": 1, "max_length": 50,
}  # fmt: skip


def a_batch(vocab_size=300, samples=3):
    ids = torch.randint(3, vocab_size, (samples, 7))
    labels = torch.randint(3, vocab_size, (samples, 5))
    labels[1, 3:] = -100
    start = torch.zeros(samples, 1, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "decoder_input_ids": torch.cat([start, labels[:, :-1].clamp(min=0)], 1),
    }


# ---- the model


def test_the_model_is_transformer_base():
    model = build_model(
        vocab_size=37_000, width=512, ffn_width=2_048, num_layers=6, num_heads=8, dropout=0.1, attention_dropout=0.1,
        activation_dropout=0.1, pad_token_id=0, eos_token_id=1, max_length=250,
    )  # fmt: skip
    # Vaswani et al. 2017, table 3: 65 million with a joint vocabulary of 37 000; written out here from the layers
    width, ffn = 512, 2_048
    attention, norm = 4 * (width * width + width), 2 * width
    feed_forward = 2 * width * ffn + ffn + width
    layers = 6 * (attention + feed_forward + 2 * norm) + 6 * (2 * attention + feed_forward + 3 * norm)
    assert count_parameters(model) == layers + 37_000 * width
    assert 62e6 < count_parameters(model) < 66e6
    shared = model.get_input_embeddings().weight
    assert model.lm_head.weight is shared
    assert model.get_decoder().embed_tokens.weight is shared
    assert model.config.activation_function == "relu"


def test_all_four_dropouts_are_set_and_fresh_logits_are_near_unit_scale():
    model = build_model(vocab_size=300, **SMALL)
    layer = model.model.decoder.layers[0]
    assert (layer.dropout, layer.activation_dropout, layer.encoder_attn.dropout) == (0.1, 0.3, 0.2)
    assert model.model.encoder.dropout == 0.1
    with torch.no_grad():
        logits = model.eval()(**a_batch()).logits
    assert 0.3 < float(logits.std()) < 3


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_the_loss_is_torchs_cross_entropy_of_transformers_logits(label_smoothing, bias):
    model = build_model(
        vocab_size=300, **{**SMALL, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    )
    model.final_logits_bias += bias * torch.randn(300)
    batch = a_batch()
    logits = model(**batch).logits
    want = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"], reduction="sum", label_smoothing=label_smoothing
    )
    loss = TranslationLoss(model, label_smoothing)
    torch.testing.assert_close(loss.train()(batch), want)
    unsmoothed = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="sum")
    torch.testing.assert_close(loss.eval()(batch), unsmoothed)


# ---- translations and their score


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    text = generate_corpus(train=300, valid=5, test=40)
    tokenizer = load_tokenizer(train_tokenizer(text["train"], 500, tmp_path_factory.mktemp("cache")))
    torch.manual_seed(0)
    model = build_model(vocab_size=len(tokenizer), **{**SMALL, "pad_token_id": 0, "eos_token_id": 1})
    model.generation_config = decoding_config(model, num_beams=2, length_penalty=0.6, max_length=12)
    return model.train(), tokenizer, text["test"].source


def test_translations_come_in_the_order_of_the_sources_whatever_their_lengths(translator):
    model, tokenizer, sources = translator
    accelerator = Accelerator(cpu=True)
    together = translate(accelerator, model, tokenizer, sources, max_tokens=64, max_new_tokens=11)
    alone = [translate(accelerator, model, tokenizer, [source], max_new_tokens=11)[0] for source in sources]
    assert together == alone
    assert len(set(together)) > 5  # the order could be seen to be wrong
    assert model.training  # put back as it was


def test_evaluation_meets_no_dropout_and_moves_no_generator(translator):
    model, tokenizer, sources = translator
    before = torch.get_rng_state()
    first = translate(Accelerator(cpu=True), model, tokenizer, sources[:8])
    assert first == translate(Accelerator(cpu=True), model, tokenizer, sources[:8])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_is_never_decoded_however_likely_it_is(num_beams, translator):
    model, tokenizer, sources = translator
    model = copy.deepcopy(model).eval()
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    model.final_logits_bias[0, pad] = 100.0
    model.generation_config = decoding_config(model, num_beams=num_beams, length_penalty=0.6, max_length=9)
    found = model.generate(**tokenizer(sources[:5], padding=True, return_tensors="pt"))[:, 1:].tolist()
    for row in found:
        assert pad not in row[: row.index(eos) if eos in row else None]


@pytest.mark.trap(36)
def test_a_bleu_is_printed_with_its_signature_beam_and_penalty_formula():
    hypotheses, references = ["das ist ein Haus und ein Baum .", "ja"], ["das ist das Haus und ein Baum .", "nein"]
    score = score_bleu(hypotheses, references, str(Decoding(4, 0.6)))
    metric = sacrebleu.metrics.BLEU()
    assert score.bleu == metric.corpus_score(hypotheses, [references]).score
    assert score.signature == str(metric.get_signature())
    text = str(score)
    for part in ("BLEU 57.74", "nrefs:1", "tok:13a", "smooth:exp", "version:", "beam 4", "log-probability / L^0.6"):
        assert part in text, part
    with pytest.raises(ValueError, match="1 hypotheses cannot be scored against 2 references"):
        score_bleu(["a"], references, "")


@pytest.mark.trap(36)
def test_the_length_penalty_is_the_formula_that_is_named(translator):
    """transformers ranks beams by log-probability / L^a, L counting the tokens after the start, eos included."""
    model, tokenizer, sources = translator
    model.eval()
    batch = tokenizer(sources[:1], return_tensors="pt")
    for penalty in (0.0, 0.6, 2.0):
        said = decoding_config(model, num_beams=4, length_penalty=penalty, max_length=12)
        out = model.generate(**batch, generation_config=said, output_scores=True, return_dict_in_generate=True)
        tokens = out.sequences[:, 1:]
        logits = model(**batch, decoder_input_ids=out.sequences[:, :-1]).logits.log_softmax(-1)
        log_probability = logits.gather(2, tokens[..., None]).sum()
        want = log_probability / tokens.shape[1] ** penalty
        torch.testing.assert_close(out.sequences_scores[0], want, rtol=1e-4, atol=1e-4)


# ---- options

OPTIONS = [
    option
    for part in (TranslationConfig, BatchAugmentationArguments, RunOptions, MachineOptions)
    for option in dataclasses.fields(part)
]


def test_dashes_and_underscores_are_both_taken_and_every_option_has_help():
    assert parse_config(["--ba-m", "4"]).copies == parse_config(["--ba_m", "4"]).copies == BatchAugmentationArguments(4)
    for option in OPTIONS:
        assert len(option.metadata["help"]) > 15, option.name
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    asked = {"--preset", "--ba-m", "--copies-per-pass", "--reproducible-copies", "--max-updates", "--save-every",
             "--eval-every", "--output-dir", "--seed", "--resume"}  # fmt: skip
    assert asked <= {flag(option.name) for option in OPTIONS}


def test_options_are_changed_in_the_part_that_has_them_and_an_unknown_one_is_refused():
    changed = parse_config([]).changed(ba_m=3, copies_per_pass=2, dropout=0.5, max_updates=7, cpu=True)
    assert (changed.copies, changed.config.dropout) == (BatchAugmentationArguments(3, 2), 0.5)
    assert (changed.run.max_updates, changed.machine.cpu) == (7, True)
    with pytest.raises(TypeError, match="there is no option 'max_update'"):
        changed.changed(max_update=9)


def test_a_preset_is_data_and_any_option_overrides_it():
    base = parse_config(["--preset", "transformer-base", "--dropout", "0.3"]).config
    assert (base.width, base.num_layers, base.warmup_updates, base.dropout) == (512, 6, 4_000, 0.3)
    for values in PRESETS.values():
        assert values.keys() <= {option.name for option in OPTIONS}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ba-m", "0"], "^--ba-m must be a whole number of at least 1, got 0"),
        (["--ba-m", "4", "--copies-per-pass", "5"], "^--copies-per-pass must be auto or from 1 to --ba-m 4, got 5"),
        (["--copies-per-pass", "some"], "--copies-per-pass: must be auto or from 1 to ba_m, got some"),
        (["--preset", "nothing"], "--preset must be one of generated, transformer-base, .*, got nothing"),
        (["--dropout", "1"], r"--dropout is a probability, from 0 to below 1, got 1\.0"),
        (["--label-smoothing", "-0.1"], r"--label-smoothing is a probability.*got -0\.1"),
        (["--width", "30", "--num-heads", "4"], r"--width must be a multiple of 2 \* --num-heads = 8, got 30"),
        (["--max-updates", "0"], "--max-updates must be at least 1, got 0"),
        (["--train-prefix", "x"], "needs --train-prefix and --valid-prefix"),
        (["--bam", "4"], "unknown option --bam 4"),
        (["--max-norm", "0"], r"--max-norm must be above 0 and finite, got 0\.0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--log-every", "0"], "--log-every must be at least 1, got 0"),
        (["--test-prefix", "x"], "needs --train-prefix and --valid-prefix"),
        (["--max-length-ratio", "0.5"], r"--max-length-ratio must be at least 1, got 0\.5"),
        (["--lr-decay", "steps"], "--lr-decay must be one of inverse-sqrt, linear, cosine, got steps"),
        (
            ["--lr-decay", "cosine", "--max-updates", "9", "--warmup-updates", "9"],
            "9 must be below --max-updates 9",
        ),
        (
            ["--preset", "multi30k-small"],
            r"reads multi30k/train, .* --data-dir or \$SEQBA_DATA .*; neither is",
        ),
    ],
)
def test_a_bad_option_is_named_with_its_limit(argv, message, monkeypatch):
    monkeypatch.delenv("SEQBA_DATA", raising=False)
    with pytest.raises(UserError, match=message):
        parse_config(argv)


def test_a_preset_with_text_reads_it_under_the_data_folder_and_is_overridden_by_options(monkeypatch):
    monkeypatch.setenv("SEQBA_DATA", "from-environment")
    preset = parse_config(["--preset", "multi30k-small"]).config
    assert preset.valid_prefix == str(Path("from-environment/multi30k/val"))
    options = parse_config(
        ["--preset", "multi30k-small", "--data-dir", "here", "--dropout", "0.3", "--test-prefix", "t"]
    )
    config = options.config
    assert config.train_prefix == [str(Path("here/multi30k/train"))]
    assert config.test_prefix == ["t"]
    assert (config.dropout, config.attention_dropout, options.run.max_updates) == (0.3, 0.2, 3_000)
    wmt = parse_config(["--preset", "transformer-base-wmt16"]).config
    assert wmt.train_prefix == ["datasets:wmt/wmt16:de-en:train"]
    own = parse_config(["--preset", "transformer-base-ende", "--train-prefix", "a", "--valid-prefix", "b"]).config
    assert (own.train_prefix, own.valid_prefix, own.test_prefix) == (["a"], "b", [])


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], {"--max-updates": "800", "--train-prefix": None}),
        (["--preset", "multi30k-small"], {"--max-updates": "3000", "--train-prefix": "['multi30k/train']"}),
        (["--preset=transformer-base"], {"--max-updates": "100000", "--ffn-width": "2048"}),
        (
            ["--preset", "multi30k-small", "--train_prefix", "own", "more"],
            {"--lr-decay": "cosine", "--train-prefix": None},
        ),
    ],
)
def test_help_shows_the_values_of_the_preset_that_is_named(argv, shown, monkeypatch, capsys):
    monkeypatch.delenv("SEQBA_DATA", raising=False)
    with pytest.raises(SystemExit, match="0"):
        parse_config([*argv, "--help"])
    said = capsys.readouterr().out
    for name, value in shown.items():
        help_of_option = " ".join(re.split(r"\n  -|\n\n", said.split(f"\n  {name} ")[1])[0].split())
        found = re.search(r"\(default: (.*)\)", help_of_option)
        assert (found and found[1]) == value


def test_help_has_groups_choices_and_one_spelling(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_config(["--help"])
    groups = dict(re.findall(r"(?m)^(\S.*):\n((?:  .*\n|\n(?=  ))+)", capsys.readouterr().out))
    assert list(groups) == [
        "options", "data", "model; the dropouts are the transform T", "optimisation", "decoding", "Batch Augmentation",
        "run", "machine",
    ]  # fmt: skip
    assert f"--preset {{{','.join(PRESETS)}}}" in groups["options"]
    assert "--lr-decay {inverse-sqrt,linear,cosine}\n" in groups["optimisation"]
    assert "--mixed-precision {no,bf16,fp16}\n" in groups["machine"]
    assert "--ba-m BA_M " in groups["Batch Augmentation"]
    assert "--traceback " in groups["options"]
    assert not any(re.search(r"--[a-z]+_", text) for text in groups.values())


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ("--ba-m 4", "translation-generated-m4-seed0"),
        ("--preset multi30k-small --ba-m 4", "translation-multi30k-small-m4-seed0"),
        ("--preset multi30k-small --data-dir here --seed 2", "translation-multi30k-small-m1-seed2"),
        ("--preset transformer-base-wmt16", "translation-transformer-base-wmt16-m1-seed0"),
        ("--preset multi30k-small --train-prefix my/news --valid-prefix v", "translation-news-m1-seed0"),
        ("--preset multi30k-small --train-prefix my/train --valid-prefix v", "translation-train-m1-seed0"),
        ("--preset transformer-base-wmt16 --train-prefix datasets:a/b:c:train --valid-prefix v",
         "translation-b-train-m1-seed0"),
        ("--preset transformer-base-ende --train-prefix my/news my/more --valid-prefix v", "translation-news-m1-seed0"),
        ("--preset multi30k-small --output-dir there", "there"),
    ],
)  # fmt: skip
def test_the_run_folder_is_named_after_the_text_that_is_used(argv, folder, monkeypatch):
    monkeypatch.setenv("SEQBA_DATA", "data")
    assert Path(run_folder(parse_config(argv.split()))).name == folder


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_rate_that_falls_to_the_last_update_ends_at_zero_and_fixes_that_update(decay):
    config = TranslationConfig(lr_decay=decay, warmup_updates=10, width=64, num_heads=2, lr_scale=0.5)
    rate = learning_rate(config, max_updates=100)
    peak = 0.5 * (64 * 10) ** -0.5
    assert rate(10) == pytest.approx(peak)
    assert rate(5) == pytest.approx(peak / 2)
    assert rate(55) == pytest.approx(peak / 2)  # half way down, a line and half a cosine are equal
    fifth = 0.8 if decay == "linear" else (1 + math.cos(0.2 * math.pi)) / 2
    assert rate(28) == pytest.approx(peak * fifth)
    assert rate(100) == pytest.approx(0.0, abs=1e-12)
    assert "max_updates" not in may_differ(config)
    assert "max_updates" in may_differ(TranslationConfig())


# ---- the model folder, in a fresh process

FRESH = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, text = sys.argv[1:]
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = model.generate(**tokenizer([text], return_tensors="pt"))
texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
print(json.dumps([model.generation_config.num_beams, ids[0].tolist(), texts]))
"""


def test_the_model_folder_loads_in_a_fresh_process_and_translates_the_same(translator, tmp_path):
    model, tokenizer, sources = translator
    score = score_bleu(["a b c d e"], ["a b c d f"], str(Decoding(2, 0.6)))
    made_by = describe_training(parse_config(["--ba-m", "4"])) | {"data": "the data"}
    save_model_folder(
        tmp_path / "model",
        model,
        tokenizer,
        title="Translation en -> de",
        languages=("en", "de"),
        pipeline="translation",
        made_by=made_by,
        scores=[f"a set: {score}"],
        usage=USAGE,
    )
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "model"), sources[3]], capture_output=True, text=True, check=True
    )
    beams, ids, texts = json.loads(done.stdout.splitlines()[-1])
    assert beams == 2
    assert 0 not in ids[1:-1]  # padding is never emitted
    assert texts == translate(Accelerator(cpu=True), model, tokenizer, [sources[3]], max_new_tokens=11)
    card = (tmp_path / "model" / "README.md").read_text()
    for part in (
        "M | 4 (copies per pass auto",
        "| data | the data |",
        "en -> de",
        f"a set: {score}",
        "AutoModelForSeq2SeqLM",
        "AutoTokenizer",
    ):
        assert part in card
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    batch = {k: v for k, v in a_batch(len(tokenizer)).items() if k != "labels"}
    with torch.no_grad():
        np.testing.assert_allclose(again.eval()(**batch).logits, model.eval()(**batch).logits, atol=1e-6)
