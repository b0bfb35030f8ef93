"""Perplexity of causal models: every token of the text scored once, under each model's own way of reading."""

import dataclasses
import gzip
import json
import lzma
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import log_softmax
from transformers import (
    BertConfig,
    BertLMHeadModel,
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from bad_input import SCRIPTS, call
from tasks.cli.errors import DataError, UserError
from tasks.cli.options import flag
from tasks.decoding.mc_dropout import dropout_on
from tasks.language_modelling import AwdLstmConfig, AwdLstmForCausalLM
from tasks.language_modelling.evaluation import evaluate as evaluation
from tasks.language_modelling.evaluation import model as causal
from tasks.language_modelling.evaluation.config import PerplexityConfig, parse_evaluation
from tasks.language_modelling.evaluation.model import CausalModel
from tasks.language_modelling.evaluation.scoring import score_tokens
from tasks.language_modelling.evaluation.text import Text, read_text
from tasks.language_modelling.evaluation.tokens import Tokens, encode
from tasks.language_modelling.evaluation.windows import carried_windows, overlapping_windows
from tasks.language_modelling.loss import LanguageModelLoss
from tasks.language_modelling.train import evaluate as evaluate_in_training
from tasks.language_modelling.vocabulary import build_vocabulary, encode_lines
from tasks.scoring import bootstrap
from tasks.scoring.bootstrap import paired_bootstrap
from tiny_models import VOCABULARY, bart, llama
from word_tokenizer import word_tokenizer

LINES = [
    "w3 w4 w5", "", "w6  w7 ", "größe w8", "w9 <unk> w10 w11", " w12", "", "", "w13 w14 none w60", "w15"
]  # fmt: skip
POSITIONS = 8


def tiny_gpt2(dropout=0.0, vocab_size=VOCABULARY, positions=POSITIONS):
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=positions, attn_pdrop=dropout,
        embd_pdrop=dropout, resid_pdrop=dropout, initializer_range=0.5, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tiny_lstm(vocab_size=VOCABULARY, p=0.0, **more):
    torch.manual_seed(4)
    dropouts = dict.fromkeys(
        ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout", "weight_dropout"), p
    )
    sizes = {"vocab_size": vocab_size, "embedding_size": 6, "hidden_size": 7, "initializer_range": 0.9}
    return AwdLstmForCausalLM(AwdLstmConfig(**{**sizes, "eos_token_id": 1, **dropouts, **more})).eval()


def tiny_rwkv():
    torch.manual_seed(5)
    config = RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    return RwkvForCausalLM(config).eval()


def tiny_gemma(cap):
    torch.manual_seed(6)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=POSITIONS, final_logit_softcapping=cap,
        initializer_range=0.7, pad_token_id=0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def byte_tokenizer(**special):
    """Byte-level BPE, as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    made.train_from_iterator([" w1\n w1", " w2 w2", "\n\n \n\n "] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", **special)


def random_tokens(count, seed=0, first=1):
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, count)
    return Tokens(ids, np.zeros_like(ids), first, "", 0, 0)


def score(model, tokens, windows, **more):
    return score_tokens(Accelerator(cpu=True), CausalModel(model, "it"), tokens, windows, **more)


def write_lines(path, lines, end="\n"):
    text = "".join(f"{line}{end}" for line in lines).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(text))
    return path


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


@torch.no_grad()
def slow_nats(model, tokens, context):
    """Token by token, each from the `context` ids before it that the model reads alone; float64."""
    sequence = [tokens.first, *tokens.ids.tolist()]
    found = []
    for i, target in enumerate(sequence[1:]):
        logits = model(torch.tensor([sequence[: i + 1][-context(i) :]])).logits[0, -1]
        found.append(-float(log_softmax(logits.double(), -1)[target]))
    return np.array(found)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "words": save(folder / "words" / "model", tiny_gpt2()),
        "dropping": save(folder / "dropping", tiny_gpt2(dropout=0.3)),
        "bytes": save(folder / "bytes", tiny_gpt2(vocab_size=290, positions=16), byte_tokenizer()),
        "lstm": save(folder / "lstm", tiny_lstm(p=0.3)),
    }


@pytest.fixture
def text(tmp_path):
    return write_lines(tmp_path / "ten.txt", LINES)


def evaluate(*argv):
    return evaluation.evaluate(*parse_evaluation([*map(str, argv), "--cpu"]))


# ---- models of a fixed length


def test_a_window_costs_what_transformers_says():
    model, tokens = tiny_gpt2(positions=64).double(), random_tokens(40)
    ids = torch.tensor([[tokens.first, *tokens.ids]])
    want = model(input_ids=ids, labels=ids).loss.item()
    got = score(model, tokens, overlapping_windows(40, 64, 64))
    assert got.mean() == pytest.approx(want, rel=1e-6)  # its loss is float32


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny_gemma(None), lambda: tiny_gemma(2.0)])
def test_stride_1_scores_each_token_with_all_the_context_there_can_be(make):
    model, tokens = make().double(), random_tokens(30)
    got = score(model, tokens, overlapping_windows(30, POSITIONS, 1), batch_size=4)
    np.testing.assert_allclose(got, slow_nats(model, tokens, lambda i: POSITIONS), rtol=1e-9)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 24, 29])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (5, 4), (1, 1)])
def test_windows_score_each_token_once_with_the_context_that_the_stride_leaves(num_tokens, length, stride):
    model, tokens = tiny_gpt2().double(), random_tokens(num_tokens)

    def context(i):
        """Windows end at length, length + stride ..., and at the text's end."""
        end = min(length + stride * math.ceil(max(0, i + 1 - length) / stride), num_tokens)
        return i + 1 - max(0, end - length)

    want = slow_nats(model, tokens, context)
    for batch_size in (1, 3, 100):
        got = score(model, tokens, overlapping_windows(num_tokens, length, stride), batch_size=batch_size)
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("stride", [8, 3])
def test_ranks_share_the_windows_of_a_text(stride):
    model, tokens = tiny_gpt2().double(), random_tokens(61)
    windows = overlapping_windows(61, POSITIONS, stride)

    def rank(index, count):
        reduced = []
        one = SimpleNamespace(
            num_processes=count, process_index=index, device=torch.device("cpu"), autocast=nullcontext,
            reduce=lambda x, how: reduced.append(how) or x,
        )  # fmt: skip
        return score_tokens(one, CausalModel(model, "it"), tokens, windows, batch_size=2), reduced

    whole, (first, how), (second, _) = rank(0, 1)[0], rank(0, 2), rank(1, 2)
    assert how == ["sum"]
    assert not (first * second).any()
    np.testing.assert_array_equal(first + second, whole)


def test_logits_are_made_in_slices_where_they_are_those_of_the_output_layer(monkeypatch):
    monkeypatch.setattr(causal, "_MAX_LOGITS", 5 * VOCABULARY)
    tokens = random_tokens(23)
    seen = []
    for model in (tiny_gpt2(), tiny_lstm(), tiny_gemma(None), tiny_rwkv(), llama().eval()):
        one = CausalModel(model, "it")
        handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(len(out)))
        windows = carried_windows(23, 21) if one.is_recurrent else overlapping_windows(23, POSITIONS, 4)
        score_tokens(Accelerator(cpu=True), one, tokens, windows, batch_size=1 if one.is_recurrent else 3)
        handle.remove()
        assert max(seen) == 5, type(model)
        seen.clear()
    assert CausalModel(tiny_gemma(2.0), "it")._head is None  # capped behind the output layer


# ---- models that carry a state


@pytest.mark.parametrize(("make", "rounding"), [(tiny_lstm, 1e-9), (tiny_rwkv, 1e-5)])  # RWKV's state is float32
def test_a_carried_state_makes_the_window_length_irrelevant(make, rounding):
    model, tokens = make().double(), random_tokens(41)
    assert CausalModel(model, "it").is_recurrent
    state, last, want = None, tokens.first, []
    with torch.no_grad():
        for target in tokens.ids:
            out = model(torch.tensor([[last]]), state=state, use_cache=True)
            want.append(-float(log_softmax(out.logits[0, -1], -1)[target]))
            state, last = out.state, target
    for length in (1, 6, 41, 1_000):
        np.testing.assert_allclose(score(model, tokens, carried_windows(41, length)), want, rtol=rounding)
    np.testing.assert_allclose(slow_nats(model, tokens, lambda i: 41), want, rtol=rounding)


def test_models_without_a_state_are_no_recurrent_ones():
    assert not any(CausalModel(model, "it").is_recurrent for model in (tiny_gpt2(), tiny_gemma(None), llama().eval()))


def test_it_agrees_with_the_evaluation_of_the_training_run(tmp_path):
    lines = ["a dog sleeps", "", "a <unk> a", "dogs bark at a cat"] * 9
    tokenizer = build_vocabulary(lines)
    model = tiny_lstm(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    ids = encode_lines(lines, tokenizer, "it")
    want = evaluate_in_training(Accelerator(cpu=True), LanguageModelLoss(model), ids, 1, "test")
    folder, file = save(tmp_path / "m", model.eval(), tokenizer), write_lines(tmp_path / "text", lines)
    got = evaluate("--model", folder, "--data", file)["models"]["m"]
    assert got["tokens"] == len(ids)
    assert got["nats_per_token"] == pytest.approx(want["test_loss"], rel=1e-6)
    assert got["perplexity"] == pytest.approx(want["test_perplexity"], rel=1e-6)
    assert got["perplexity"] == pytest.approx(got["word_perplexity"], rel=1e-9)  # a token is a word or a line end


# ---- counts and figures


@pytest.mark.trap(36)
def test_ten_lines_counted_by_hand(folders, text, tmp_path, capsys):
    results = evaluate("--model", folders["words"], "--data", text, "--stride", 1, "--output-dir", tmp_path / "out")
    counts, one = results["text"], results["models"]["words"]
    # 3 + 0 + 2 + 2 + 4 + 1 + 0 + 0 + 4 + 1 words
    assert (counts["lines"], counts["words"], one["tokens"]) == (10, 17 + 10, 17 + 10)
    # 8 0 7 10 16 4 0 0 16 3 bytes: "größe w8" is 7 + 3
    assert counts["bytes"] == 8 + 0 + 7 + 10 + 16 + 4 + 0 + 0 + 16 + 3 + 10
    assert one["unknown"] == 2  # größe and none; <unk> is a word of the text
    assert (one["line_end"], one["dropped"]) == ("</s>", 0)
    ids = [3, 4, 5, 1, 1, 6, 7, 1, 2, 8, 1, 9, 2, 10, 11, 1, 12, 1, 1, 1, 13, 14, 2, 60, 1, 15, 1]
    tokens = Tokens(np.array(ids), None, 1, "", 0, 0)
    nats = slow_nats(tiny_gpt2(), tokens, lambda i: POSITIONS).sum()
    assert one["nats"] == pytest.approx(nats, rel=1e-5)
    assert one["nats_per_token"] == pytest.approx(nats / 27, rel=1e-5)
    assert one["perplexity"] == pytest.approx(math.exp(nats / 27), rel=1e-4)
    assert one["word_perplexity"] == pytest.approx(math.exp(nats / 27), rel=1e-4)
    assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / 74, rel=1e-5)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    said = capsys.readouterr().out
    for part in ("10 lines; 74 bytes of UTF-8, a line end counted as one; 27 words between white space, each line end",
                 "words scores 27 tokens",
                 "words: read in windows of 8 tokens, stride 1; line ends are </s>; 2 unknown tokens",
                 "words: 2 tokens stand for words outside of its vocabulary", f"{one['perplexity']:.2f}",
                 f"{one['bits_per_byte']:.4f}", "of the model's own tokens, line ends counted"):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize(("name", "end"), [("a.txt", "\r\n"), ("a.gz", "\n"), ("a.xz", "\r\n")])
def test_a_file_counts_the_same_however_it_is_packed_and_its_lines_end(name, end, tmp_path):
    file = write_lines(tmp_path / name, LINES, end)
    if name == "a.txt":
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().removesuffix(b"\r\n"))
    text = read_text(str(file), None)
    assert (list(text.lines), int(text.line_bytes.sum()), text.num_words) == (LINES, 74, 27)


@pytest.mark.trap(40)
def test_a_folder_of_local_splits_is_read(folders, tmp_path):
    for split, lines in {"train": LINES, "valid": LINES[:3], "test": LINES[2:4]}.items():
        write_lines(tmp_path / f"ptb.{split}.txt", lines)
    found = [
        evaluate("--model", folders["words"], "--data", tmp_path, *more)["text"] for more in ([], ["--split", "valid"])
    ]
    assert [(one["lines"], one["called"]) for one in found] == [(2, f"{tmp_path}, test"), (3, f"{tmp_path}, valid")]


# ---- line ends, and what the vocabulary lacks


def test_a_byte_level_tokenizer_encodes_the_whole_text_with_its_line_ends():
    tokenizer, lines = byte_tokenizer(), [" w1", "", "", " ä😀 w2 ", "\u2028w1", " w1  ", "", "end"]
    whole = "".join(f"{line}\n" for line in lines)
    for one in (encode(Text(lines, "it"), tokenizer), encode(Text(lines, "it"), tokenizer, "newline")):
        assert tokenizer.decode(one.ids) == whole
        assert one.ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert (one.unknown, one.dropped, one.line_end) == (0, 0, '"\\n"')
        assert one.first == tokenizer("\n")["input_ids"][-1]
        # the bytes before a token say its line
        pieces = [tokenizer.backend_tokenizer.id_to_token(n) for n in one.ids]
        before = np.cumsum([0, *(piece.count("Ċ") for piece in pieces)])[:-1]
        assert one.lines.tolist() == before.tolist()
    assert len(set(one.lines.tolist())) < len(lines)  # "\n\n" is one token, of the line that it begins in
    assert any(piece.count("Ċ") > 1 for piece in pieces)
    assert encode(Text(lines, "it"), byte_tokenizer(bos_token="w")).first == byte_tokenizer(bos_token="w").bos_token_id


def test_eos_stands_for_a_line_end_where_the_tokenizer_has_none_or_it_is_asked_for():
    lines, words = ["w3  w4", "", "w5"], word_tokenizer()
    for how in ("auto", "eos"):
        one = encode(Text(lines, "it"), words, how)
        assert (one.ids.tolist(), one.lines.tolist(), one.first) == ([3, 4, 1, 1, 5, 1], [0, 0, 0, 1, 2, 2], 1)
    tokenizer = byte_tokenizer(bos_token="<|end|>")
    one = encode(Text(lines, "it"), tokenizer, "eos")
    assert tokenizer.decode(one.ids) == "w3  w4<|end|><|end|>w5<|end|>"
    assert one.lines.tolist() == [0] * (len(one.ids) - 4) + [1, 2, 2, 2]
    with pytest.raises(UserError, match=r'--line-end newline: .* does not give "\\n" back; give --line-end eos'):
        encode(Text(lines, "it"), words, "newline")
    words.eos_token = None
    with pytest.raises(UserError, match=r"--line-end eos: .* has no end-of-sequence token; give --line-end newline"):
        encode(Text(lines, "it"), words, "eos")


def test_a_tokenizer_without_offsets_reads_line_by_line():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    one = encode(Text(["ä b", "", "c"], "it"), tokenizer)
    assert (one.lines.tolist(), one.line_end) == ([0] * 5 + [1, 2, 2], '"\\n"')
    assert tokenizer.decode(one.ids) == "ä b\n\nc\n"
    assert encode(Text(["ä b", "", "c"], "it"), tokenizer, "eos").lines.tolist() == [0] * 5 + [1, 2, 2]


def test_words_outside_a_vocabulary_are_counted_or_refused_with_their_line():
    known = ["a dog", "", "a cat"]
    tokenizer = build_vocabulary(known)
    assert tokenizer.unk_token is None
    assert encode(Text(known, "it"), tokenizer).unknown == 0
    with pytest.raises(DataError, match=r"it, line 3: 'bird' is not in the vocabulary of .* has no unknown token"):
        encode(Text([*known[:2], "a bird"], "it"), tokenizer)
    letters = Tokenizer(models.BPE({"a": 0, "b": 1, "\n": 2, "e": 3}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split(" ", "removed"), decoders.Fuse()
    for tokenizer, how in ((PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="e"), how) for how in
                           ("newline", "eos")):  # fmt: skip
        assert len(encode(Text(["ab a", "b"], "it"), tokenizer, how).ids) == 6
        with pytest.raises(DataError, match="it, line 2: 'acb' is not in the vocabulary"):
            encode(Text(["ab", "acb", "d"], "it"), tokenizer, how)
    words = word_tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    one = encode(Text(["w3 \u200b x", "<unk> w4"], "it"), words)
    assert (one.unknown, one.dropped) == (1, 1)


def test_a_line_end_inside_of_a_line_is_refused():
    with pytest.raises(DataError, match="it, line 2 holds '</s>', which --line-end eos puts at the end of every line"):
        encode(Text(["w3", "w4 </s> w5"], "it"), word_tokenizer())


# ---- Monte Carlo dropout


@pytest.mark.parametrize("num_masks", [1, 4])
@pytest.mark.parametrize("recurrent", [False, True])
def test_masks_are_averaged_as_probabilities_of_each_token(recurrent, num_masks):
    tokens = random_tokens(29)
    model = (tiny_lstm(p=0.4, mask_scope="shared") if recurrent else tiny_gpt2(dropout=0.3)).double()
    windows = carried_windows(29, 6) if recurrent else overlapping_windows(29, POSITIONS, 5)
    torch.manual_seed(9)
    got = score(model, tokens, windows, batch_size=1 if recurrent else 2, num_masks=num_masks)

    # the slow twin reads the same windows in the same order, so it draws the same masks
    torch.manual_seed(9)
    sequence, want, states = np.array([tokens.first, *tokens.ids]), np.full(29, np.nan), [None] * num_masks
    with torch.no_grad(), dropout_on(model):
        for _, inputs, labels in windows.batches(sequence, 1 if recurrent else 2):
            probabilities = torch.zeros(())
            for n in range(num_masks):
                out = model(inputs, **({"state": states[n]} if recurrent else {}))
                states[n] = out.state if recurrent else None
                probabilities = probabilities + out.logits.softmax(-1) / num_masks
            scored = labels != -100
            chosen = probabilities.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)[scored]
            first = int(np.flatnonzero(np.isnan(want))[0])
            want[first : first + len(chosen)] = -chosen.log().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert not model.training


def test_masks_follow_the_seed_and_not_the_other_models(folders, text):
    def nats(*models, seed=1):
        argv = ["--data", text, "--mc-dropout", 3, "--seed", seed, "--model"]
        return {name: one["nats"] for name, one in evaluate(*argv, *(folders[m] for m in models))["models"].items()}

    alone, again, other = nats("dropping"), nats("lstm", "dropping"), nats("dropping", seed=2)
    assert alone["dropping"] == again["dropping"] != other["dropping"]
    plain = evaluate("--model", folders["dropping"], "--data", text)["models"]["dropping"]
    assert "3 dropout masks" not in plain["reading"]
    assert plain["nats"] != alone["dropping"]


@pytest.mark.trap(34)
def test_a_model_that_drops_nothing_out_is_known():
    dropping = [tiny_lstm(weight_dropout=0.3, mask_scope=scope) for scope in ("shared", "per_copy")]
    models = [CausalModel(model, "it") for model in (*dropping, tiny_gpt2(dropout=0.1), tiny_lstm(), tiny_gpt2())]
    state = torch.get_rng_state()
    assert [model.is_random() for model in models] == [True, True, True, False, False]
    assert torch.equal(state, torch.get_rng_state())


# ---- comparison


def test_the_bootstrap_equals_a_slow_loop(monkeypatch):
    draw = np.random.default_rng(1)
    sizes = draw.integers(1, 30, 13)
    first = sizes * draw.uniform(1, 3, 13)
    amounts = {"a": first, "b": first + draw.normal(0.5, 3, 13), "c": first * 1.5, "d": first.copy()}
    found = paired_bootstrap(amounts, sizes, num_samples=50, seed=3)
    monkeypatch.setattr(bootstrap, "_PICKED", 40)
    assert paired_bootstrap(amounts, sizes, num_samples=50, seed=3) == found
    picked = np.random.default_rng(3).integers(13, size=(50, 13)).tolist()
    assert [one.model for one in found] == ["b", "c", "d"]
    for one in found:

        def ratio(lines, name):
            return sum(amounts[name][i] for i in lines) / sum(sizes[i] for i in lines)

        value, difference = ratio(range(13), one.model), ratio(range(13), one.model) - ratio(range(13), "a")
        drawn = sorted(ratio(lines, one.model) - ratio(lines, "a") for lines in picked)
        mean = sum(drawn) / 50
        beyond = sum(abs(x - mean) >= abs(difference) for x in drawn)
        low, high = (
            drawn[int(at)] + (at % 1) * (drawn[int(at) + 1] - drawn[int(at)]) for at in (49 * 0.025, 49 * 0.975)
        )
        got = [one.value, one.difference, one.low, one.high, one.p_value]
        assert got == pytest.approx([value, difference, low, high, (1 + beyond) / 51], rel=1e-9, abs=1e-12)
    assert found[0].p_value > 0.1
    assert found[1].p_value == pytest.approx(1 / 51)
    assert found[2] == bootstrap.Difference("d", found[2].value, 0.0, 0.0, 0.0, 1.0)


def test_the_interval_of_equally_long_lines_is_that_of_a_mean():
    draw, count = np.random.default_rng(2), 900
    change = draw.normal(0.2, 1.0, count)
    (one,) = paired_bootstrap({"a": np.zeros(count), "b": change}, np.ones(count, int), num_samples=2_000, seed=1)
    half = 1.96 * change.std() / math.sqrt(count)
    assert one.low == pytest.approx(change.mean() - half, abs=0.1 * half)
    assert one.high == pytest.approx(change.mean() + half, abs=0.1 * half)
    with pytest.raises(ValueError, match="at least two models and a line"):
        paired_bootstrap({"a": np.ones(2)}, np.ones(2), num_samples=1, seed=1)
    with pytest.raises(ValueError, match="at least two models and a line"):
        paired_bootstrap({"a": np.ones(2), "b": np.ones(3)}, np.ones(2), num_samples=1, seed=1)


def test_models_of_other_tokenizers_compare_in_bits_per_byte(folders, text, capsys):
    argv = ["--model", folders["words"], folders["bytes"], folders["lstm"], "--data", text, "--resamples", 200]
    results = evaluate(*argv)
    models = results["models"]
    assert models["bytes"]["tokens"] != models["words"]["tokens"] == models["lstm"]["tokens"]
    for one in models.values():
        assert one["bits_per_byte"] == pytest.approx(one["nats"] / math.log(2) / 74)
        assert one["word_perplexity"] == pytest.approx(math.exp(one["nats"] / 27))
        assert one["nats_per_token"] == pytest.approx(one["nats"] / one["tokens"])
    assert [one["model"] for one in results["paired_bootstrap"]] == ["bytes", "lstm"]
    for one in results["paired_bootstrap"]:
        bits = models[one["model"]]["bits_per_byte"]
        assert one["value"] == pytest.approx(bits)
        assert one["difference"] == pytest.approx(bits - models["words"]["bits_per_byte"])
        assert one["low"] < one["difference"] < one["high"]
    assert evaluate(*argv)["paired_bootstrap"] == results["paired_bootstrap"]
    said = capsys.readouterr().out
    for part in ("minus words's", "paired bootstrap over lines (Koehn 2004), 200 resamples, seed 12345",
                 "lstm: read in one stream, its state carried; windows of 4,096 tokens",
                 'bytes: read in windows of 16 tokens, stride 16; line ends are "\\n"; 0 unknown'):  # fmt: skip
        assert part in said, part


def test_lines_are_compared_by_the_tokens_that_they_hold(folders, text, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        evaluation, "paired_bootstrap", lambda amounts, sizes, **_: seen.update(amounts, sizes=sizes) or []
    )
    evaluate("--model", folders["words"], folders["bytes"], "--data", text, "--stride", 1)
    assert seen["sizes"].tolist() == [len(f"{line}\n".encode()) for line in LINES]
    for name, model in (("words", tiny_gpt2()), ("bytes", tiny_gpt2(vocab_size=290, positions=16))):
        tokens = encode(read_text(str(text), None), word_tokenizer() if name == "words" else byte_tokenizer())
        nats = slow_nats(model, tokens, lambda i, size=model.config.n_positions: size)
        want = [nats[tokens.lines == i].sum() / math.log(2) for i in range(10)]
        np.testing.assert_allclose(seen[name], want, rtol=1e-4)


def test_equal_models_differ_by_nothing(folders, text, tmp_path):
    twin = save(tmp_path / "twin", tiny_gpt2())
    (one,) = evaluate("--model", folders["words"], twin, "--data", text)["paired_bootstrap"]
    assert (one["difference"], one["low"], one["high"], one["p_value"]) == (0, 0, 0, 1)


# ---- the script


def test_the_script_end_to_end(folders, text, tmp_path):
    out = tmp_path / "out"
    argv = [sys.executable, SCRIPTS / "eval_ppl.py", "--model", folders["words"], folders["lstm"], "--data", text,
            "--stride", "4", "--output-dir", out, "--num-threads", "1", "--cpu"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["options"]["stride"] == 4
    assert results["options"]["num_threads"] == 1
    assert list(results["models"]) == ["words", "lstm"]
    for one in results["models"].values():
        assert f"{one['nats_per_token']:.4f}" in done.stdout
    assert f"{out}: results.json" in done.stdout


@pytest.fixture
def run_script(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "score_tokens", lambda *args, **more: pytest.fail("scored"))

    def run(*argv):
        return call("eval_ppl.py", [*argv, "--cpu"], monkeypatch, capsys)

    return run


def with_a_larger_tokenizer(folder):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w1000"])
    return save(folder, tiny_gpt2(), tokenizer)


def with_an_id_too_high(folder):
    made = Tokenizer(models.WordLevel({"</s>": 1, "<unk>": 2, "w3": VOCABULARY}, unk_token="<unk>"))
    return save(
        folder, tiny_gpt2(), PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    )


def bert(folder):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return save(folder, BertLMHeadModel(config))


def without_tokenizer(folder):
    tiny_gpt2().save_pretrained(folder)
    return folder


def damaged(folder):
    model = tiny_gpt2()
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    return save(folder, model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "there is no such folder"),
        (lambda folder: save(folder, bart()), "is a bart, of which transformers has no causal language model"),
        (without_tokenizer, "has no tokenizer|a tokenizer cannot be loaded"),
        (with_a_larger_tokenizer, "its tokenizer has 62 pieces, the model only 61; one is another's"),
        (with_an_id_too_high, "its tokenizer has the id 61, the model only those below 61"),
        (damaged, r"predicts no numbers \(NaN\): its weights are damaged"),
        (bert, "depends on the tokens after it, so that it is no causal language model"),
    ],
)
def test_a_model_that_cannot_score_is_refused_with_the_reason(make, message, text, folders, tmp_path, run_script):
    verdict = run_script("--model", folders["words"], make(tmp_path / "given"), "--data", text)
    assert verdict.status == 1
    assert verdict.error.startswith("error: --model ")
    assert re.search(message, verdict.error), verdict.error


@pytest.mark.trap(34)
def test_what_does_not_fit_the_models_is_refused_before_any_is_scored(folders, text, tmp_path, run_script):
    words, lstm = folders["words"], folders["lstm"]
    for argv, message in (
        ([words, "--max-length", 9], "--max-length 9 is more than the 8 positions of the model words"),
        ([words, "--stride", 9], "--stride 9 is more than the 8 tokens that the model words reads at once"),
        ([lstm, "--stride", 4], "--stride 4: the model carries a state through the text"),
        ([lstm, "--batch-size", 4], "--batch-size 4: the model carries a state through the text"),
        ([lstm, words, "--mc-dropout", 2], "--mc-dropout 2: the model words drops nothing out"),
        ([words, "--line-end", "newline"], "--line-end newline: the model's "),
    ):
        verdict = run_script("--data", text, "--model", *argv)
        assert verdict.status == 1
        assert verdict.error.startswith(f"error: {message}"), verdict.error
    write_lines(tmp_path / "results.json", ["{}"])
    verdict = run_script("--model", words, "--data", text, "--output-dir", tmp_path)
    assert "already holds results.json; name another folder" in verdict.error


def test_text_that_cannot_be_scored_is_refused(folders, text, tmp_path, run_script):
    for name, content in (("empty", b""), ("mark", b"\xef\xbb\xbf"), ("blank", b"\n \n\n"), ("latin1", b"a\n\xf6\n")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train.txt", LINES)
    for argv, message in (
        (["empty"], "empty is empty"),
        (["mark"], "mark is empty"),
        (["blank"], "blank: 3 lines, and no word in any; there is nothing to score"),
        (["latin1"], "latin1, line 2: not valid UTF-8"),
        (["none"], "cannot load"),
        (["folder"], "has no split 'test': looked for ptb.test.txt"),
        (["ten.txt", "--split", "test"], "ten.txt is a file, which has no splits; leave --split test out"),
    ):
        verdict = run_script("--model", folders["words"], "--data", tmp_path / argv[0], *argv[1:])
        assert verdict.status == 1
        assert message in verdict.error, verdict.error


def test_probabilities_of_0_are_refused(folders, text, monkeypatch):
    nats = np.where(np.arange(27) < 2, np.inf, 1.0)
    monkeypatch.setattr(evaluation, "score_tokens", lambda *args, **more: nats)
    with pytest.raises(UserError, match="--model words: the probabilities of 2 of 27 tokens are 0 or no number at all"):
        evaluate("--model", folders["words"], "--data", text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model DIR names what is evaluated; none is given"),
        (["--model", "a", "a", "--data", "d"], "--model a is given twice"),
        (["--model", "a"], "no text to score: give --data, a file or a folder of splits"),
        (["--model", "a", "--data", "d", "--split", "dev"], "--split must be one of train, valid, test, got dev"),
        (
            ["--model", "a", "--data", "d", "--line-end", "crlf"],
            "--line-end must be one of auto, newline, eos, got crlf",
        ),
        (["--model", "a", "--data", "d", "--stride", "0"], "--stride must be at least 1, got 0"),
        (["--model", "a", "--data", "d", "--max-length", "0"], "--max-length must be at least 1, got 0"),
        (
            ["--model", "a", "--data", "d", "--max-length", "4", "--stride", "5"],
            "--stride 5 is more than --max-length 4",
        ),
        (["--model", "a", "--data", "d", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--model", "a", "--data", "d", "--mc-dropout", "-1"], "--mc-dropout must be at least 0, got -1"),
        (["--model", "a", "--data", "d", "--resamples", "0"], "--resamples must be at least 1, got 0"),
        (["--model", "a", "--data", "d", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--model", "a", "--data", "d", "--strid", "4"], "unknown option --strid 4"),
    ],
)
def test_a_bad_option_is_named_with_its_limit(argv, message):
    with pytest.raises(UserError, match=message):
        parse_evaluation(argv)


def test_every_option_has_help_and_dashes_and_underscores_are_both_taken():
    assert {"--model", "--data", "--split", "--line-end", "--max-length", "--stride", "--batch-size", "--mc-dropout",
            "--resamples", "--seed", "--output-dir"} == {
        flag(option.name) for option in dataclasses.fields(PerplexityConfig)
    }  # fmt: skip
    assert all(len(option.metadata["help"]) > 15 for option in dataclasses.fields(PerplexityConfig))
    given = ["--model", "a", "--data", "d"]
    assert parse_evaluation([*given, "--line_end", "eos"]) == parse_evaluation([*given, "--line-end", "eos"])
