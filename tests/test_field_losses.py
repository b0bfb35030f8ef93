"""Losses from the field in a Trainer: pairs, segmentation, CTC, sums; and steps, buffers and batches of odd kinds."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    DefaultFlowCallback,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from seqba.errors import UnsupportedError
from seqba.snapshot import model_snapshot
from seqba.trainer import BatchAugmentationTrainer
from tiny_models import gpt2, gradients, llama
from trainers import IDENTICAL, Pad, Samples, assert_close, make, trainer_gradients
from trainers import few_objects_to_collect as few_objects_to_collect

PLANS = [(1, 1), (3, 1), (3, "auto")]


def plain_and_ours(folder, model, data, copies, **options):
    """The gradients of a plain Trainer, and of ours without dropout: the same, whatever M is."""
    want = trainer_gradients(folder, model, data, trainer_class=Trainer, **options)
    got = trainer_gradients(folder, model, data, ba_m=copies[0], copies_per_pass=copies[1], **IDENTICAL, **options)
    return want, got


# ---- pairs


def log_likelihood(logits, labels):
    return torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None].clamp(min=0)).sum((1, 2))


def preference(outputs, labels, num_items_in_batch=None):
    """DPO as it begins: the policy is its reference, and the loss log 2 whatever stands in the pairs."""
    chosen, rejected = log_likelihood(outputs["logits"], labels).chunk(2)
    margin = (chosen - rejected) - (chosen - rejected).detach()
    return -F.logsigmoid(0.1 * margin).mean()


class Pairs(Samples):
    """Sequences of one length: chosen ones in front, rejected ones behind."""

    def __init__(self):
        super().__init__("gpt2", 4)
        self.rows = [{name: x[:4] for name, x in row.items()} for row in self.rows]


@pytest.mark.trap(52)
@pytest.mark.parametrize("copies", PLANS)
def test_pairs_keep_their_gradient(copies, tmp_path):
    options = {"compute_loss_func": preference, "settings": {"per_device_train_batch_size": 4}}
    (want,), (got,) = plain_and_ours(tmp_path, gpt2(0.0), Pairs(), copies, **options)
    assert max(float(x.abs().max()) for x in want.values()) > 1e-3
    assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.trap(52)
def test_pairs_in_a_fused_pass_that_was_asked_for_are_refused(tmp_path):
    options = {"compute_loss_func": preference, "settings": {"per_device_train_batch_size": 4}}
    with pytest.raises(UnsupportedError, match="compares the rows of a batch with each other"):
        trainer_gradients(tmp_path, gpt2(0.0), Pairs(), ba_m=2, copies_per_pass=2, **IDENTICAL, **options)


@pytest.mark.trap(44)
@pytest.mark.trap(52)
def test_rows_are_looked_at_again_after_some_updates(tmp_path, caplog):
    """A loss that begins as a mean over rows, and sets them against each other from the second update on."""
    updates, passes = [], []

    def later(outputs, labels, num_items_in_batch=None):
        states = F.normalize(outputs["logits"].mean(1), dim=-1)
        apart = F.cross_entropy(states @ states.T / 0.1, torch.arange(len(states)))
        return outputs["logits"].square().mean() + (apart if updates else 0)

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            updates.append(trainer.counters.copies_per_pass)

    settings = {"max_steps": 3}
    trainer = make(tmp_path, gpt2(0.3), Samples("gpt2", 3), settings=settings, ba_m=2, compute_loss_func=later)
    trainer.add_callback(Count())
    trainer.train()
    assert updates == [2, 1, 1]
    assert not passes


# ---- what a probe may ask, and what a mean is over


class Scenes(torch.utils.data.Dataset):
    """Pictures with a class for each pixel, of which unequal parts are 255: no class."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)
        self.classes = torch.randint(0, 3, (count, 32, 32), generator=generator)
        for n in range(count):
            self.classes[n, : 6 * n] = 255

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, n):
        return {"pixel_values": self.pixels[n], "labels": self.classes[n]}


def stack(samples):
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def segformer():
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3, drop_path_rate=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    model.decode_head.batch_norm = nn.Identity()
    return model


@pytest.mark.trap(53)
@pytest.mark.parametrize("copies", [(1, 1), (3, 2), (3, 3)])
def test_pixels_of_no_class_are_neither_asked_for_nor_counted(copies, tmp_path):
    model, data = segformer(), Scenes(5)
    batch = stack([data[n] for n in range(5)])
    logits = F.interpolate(model(batch["pixel_values"]).logits, (32, 32), mode="bilinear", align_corners=False)
    F.cross_entropy(logits, batch["labels"], ignore_index=255).backward()
    want = gradients(model)
    model.zero_grad()
    settings = {"gradient_accumulation_steps": 2}
    options = {"collator": stack, "settings": settings, "ba_m": copies[0], "copies_per_pass": copies[1], **IDENTICAL}
    (got,) = trainer_gradients(tmp_path, model, data, **options)
    assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.trap(53)
@pytest.mark.parametrize("ba_m", [1, 3])
def test_a_loss_is_never_given_a_label_that_its_batch_does_not_hold(ba_m, tmp_path):
    data, asked = Samples("gpt2", 6), []

    def loss(outputs, labels, num_items_in_batch=None):
        asked.append(set(labels.flatten().tolist()))
        return F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    trainer_gradients(tmp_path, gpt2(0.3), data, compute_loss_func=loss, ba_m=ba_m)
    batches = [Pad()([data[n] for n in range(first, first + 3)])["labels"] for first in (0, 3)]
    held = [set(labels.flatten().tolist()) for labels in batches]
    assert all(any(labels <= of_batch for of_batch in held) for labels in asked)


def ctc(reduction):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        ctc_loss_reduction=reduction,
        feat_extract_norm="layer",
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


class Sounds(torch.utils.data.Dataset):
    """Sounds with transcripts of unequal lengths."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.sounds = torch.randn(count, 400, generator=generator)
        self.texts = [torch.randint(1, 12, (2 + 3 * (n % 3),), generator=generator) for n in range(count)]

    def __len__(self):
        return len(self.sounds)

    def __getitem__(self, n):
        return {"input_values": self.sounds[n], "labels": self.texts[n]}


def pad_texts(samples):
    labels = nn.utils.rnn.pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=-100)
    return {"input_values": torch.stack([s["input_values"] for s in samples]), "labels": labels}


@pytest.mark.trap(54)
@pytest.mark.parametrize("copies", PLANS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_over_sequences_and_a_sum_are_weighed_as_by_a_plain_trainer(reduction, copies, tmp_path):
    settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    (want,), (got,) = plain_and_ours(tmp_path, ctc(reduction), Sounds(5), copies, settings=settings, collator=pad_texts)
    assert_close(got, want, rtol=1e-3, atol=1e-5)


# ---- steps


def test_a_training_step_that_leaves_out_the_passes_is_an_error(tmp_path):
    class Mine(BatchAugmentationTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = make(tmp_path, gpt2(0.3), Samples("gpt2", 9), trainer_class=Mine, ba_m=2)
    with pytest.raises(RuntimeError, match=r"0 of 1 batches .* Mine\.training_step must call super\(\)\.training_step"):
        trainer.train()
    assert trainer.state.global_step == 1  # told before the second update


def test_a_training_step_below_the_mixin_runs_once_a_batch(tmp_path):
    calls = []

    class Mine(BatchAugmentationTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            calls.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, num_items_in_batch)

    make(tmp_path, gpt2(0.3), Samples("gpt2", 6), trainer_class=Mine, ba_m=4, copies_per_pass=1).train()
    assert calls == [3, 3]


class Boxes(Samples):
    """Each sample with a list of its own length, which no pass can hold twice."""


def with_parts(samples):
    return {**Pad()(samples), "parts": [torch.ones(n + 1) for n in range(len(samples) + 1)]}


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = llama(0.3)

    def forward(self, input_ids, attention_mask, labels=None, parts=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_batch_that_cannot_be_repeated_runs_one_copy_a_pass(tmp_path):
    settings = {"remove_unused_columns": False}
    trainer = make(tmp_path, Parts(), Samples("llama", 6), ba_m=3, data_collator=with_parts, settings=settings)
    trainer.train()
    assert trainer.counters.copies_per_pass == 1
    with pytest.raises(ValueError, match=r"batch\.parts.*or run one copy a pass"):
        make(tmp_path, Parts(), Samples("llama", 6), ba_m=3, copies_per_pass=3, data_collator=with_parts).train()


def test_a_later_batch_that_cannot_be_repeated_runs_one_copy_a_pass_from_there_on(tmp_path, caplog):
    def collate(samples):
        return with_parts(samples) if len(samples) < 3 else {**Pad()(samples), "parts": None}

    settings = {"remove_unused_columns": False}
    trainer = make(tmp_path, Parts(), Samples("llama", 5), ba_m=3, data_collator=collate, settings=settings)
    trainer.train()
    assert trainer.counters.copies_per_pass == 1
    assert any("from here on one copy stands in a pass" in record.getMessage() for record in caplog.records)


def test_logs_of_equal_runs_are_equal_and_rates_stand_in_the_last_line(tmp_path):
    states = []
    for n in range(2):
        torch.manual_seed(0)
        settings = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
        trainer = make(tmp_path / str(n), gpt2(0.3), Samples("gpt2", 6), ba_m=2, settings=settings)
        trainer.train()
        state = (tmp_path / str(n) / "checkpoint-2" / "trainer_state.json").read_text()
        states.append({name: value for name, value in json.loads(state).items() if "checkpoint" not in name})
        assert "unique_samples_per_second" in trainer.state.log_history[-1]
    assert states[0] == states[1]


@pytest.mark.trap(24)
@pytest.mark.parametrize("ba_m", [1, 3])
def test_a_resumed_run_ends_in_the_state_of_the_straight_one(ba_m, tmp_path):
    """Every figure of it but the plain Trainer's own about time, and the mean loss, which it begins anew."""
    settings = {
        "logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
        "learning_rate": 0.1, "num_train_epochs": 2,
    }  # fmt: skip
    states, weights = [], []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        trainer = make(tmp_path, gpt2(0.3), Samples("gpt2", 6), ba_m=ba_m, settings=settings)
        trainer.train(resume_from_checkpoint=resume)
        state = vars(trainer.state).copy()
        timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
        rates = ("unique_samples_per_second", "seen_instances_per_second") if ba_m > 1 else ()
        lines = [{k: v for k, v in line.items() if k not in (*timed, *rates)} for line in state.pop("log_history")]
        states.append((state, lines))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert states[0] == states[1]
    assert torch.equal(*weights)


def test_a_trainer_without_callbacks_trains(tmp_path):
    trainer = make(tmp_path, gpt2(0.3), Samples("gpt2", 6), ba_m=2)
    for callback in list(trainer.callback_handler.callbacks):
        trainer.remove_callback(callback)
    trainer.add_callback(DefaultFlowCallback)
    trainer.train()
    assert trainer.counters.seen_instances == 12


# ---- buffers


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("grown", torch.ones(1))
        self.register_buffer("none", None)
        self.register_buffer("resized", torch.ones(2))
        self.register_buffer("written", torch.ones(3))

    def forward(self):
        self.grown = torch.arange(6.0).view(2, 3)
        self.none = torch.ones(2)
        self.resized.resize_(5).fill_(7.0)
        self.written.add_(1)
        self.register_buffer("new", torch.ones(1))


@pytest.mark.trap(55)
def test_undoing_a_pass_puts_the_tensors_back_that_were_there():
    model = Buffers()
    before, written = {name: x.clone() for name, x in model.named_buffers()}, model.written
    restore = model_snapshot(model)
    for _ in range(2):
        model()
        restore()
        assert {name: x.tolist() for name, x in model.named_buffers()} == {
            name: x.tolist() for name, x in before.items()
        }
        assert model.none is None
        assert model.written is written
        model._buffers.pop("new", None)
