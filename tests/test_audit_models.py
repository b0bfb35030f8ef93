"""The audit finds the truth on networks that nobody rewrote: transformers, peft, torchvision, torch's own layers."""

import random
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.ops import StochasticDepth

from seqba.audit import IdenticalCopiesError, audit_masks, check_copies_differ
from seqba.audit.report import INACTIVE, PER_COPY, SHARED
from seqba.repeat import repeat_batch
from tiny_models import FAMILIES, bart, batch_for, enable_checkpointing, gpt2, llama, marian, t5

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def bert(**more):
    config = transformers.BertConfig(vocab_size=61, max_position_embeddings=64, num_labels=3, **TINY, **more)
    return transformers.BertForSequenceClassification(config)


def vit(dropout=0.1, **more):
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **TINY,
        **more,
    )
    return transformers.ViTForImageClassification(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **TINY,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        vocab_size=11,
        mask_time_prob=0.2,
        mask_time_length=2,
        layerdrop=0.3,
    )
    return transformers.Wav2Vec2ForCTC(config)


def lora(model, **more):
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], **more)
    with warnings.catch_warnings():  # peft asks transformers for a name that it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)


def tokens(**more):
    return {key: value for key, value in batch_for("gpt2").items() if key != "labels"} | more


MODELS = {
    **{family: (build, lambda family=family: batch_for(family)) for family, build in FAMILIES.items()},
    "bert": (bert, lambda: tokens(labels=torch.tensor([0, 2, 1]))),
    "vit": (vit, lambda: {"pixel_values": torch.randn(3, 3, 16, 16)}),
}


def total_calls(audit, scope):
    return sum(operation.calls for operation in audit.operations if operation.scope == scope)


def kinds(audit):
    return {operation.kind: operation.scope for operation in audit.operations}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_dropout_of_a_transformer_is_found_and_per_copy(name, attention, monkeypatch):
    build, make_batch = MODELS[name]
    model, batch = build(attn_implementation=attention), make_batch()
    audit = audit_masks(model, batch)
    assert audit.copies_differ
    assert not audit.shared
    assert audit.variance_note == ""
    shares = [operation.variance_share for operation in audit.operations if operation.scope == PER_COPY]
    assert all(0 <= share < 1.3 for share in shares)
    assert sum(shares) > 0.8

    # an independent count: what torch's functions are called with in one plain training pass
    counted = {PER_COPY: 0, INACTIVE: 0}

    def count(function, probability):
        def counting(*args, **kwargs):
            p, training = probability(*args, **kwargs)
            counted[PER_COPY if p > 0 and training else INACTIVE] += 1
            return function(*args, **kwargs)

        return counting

    monkeypatch.setattr(F, "dropout", count(F.dropout, lambda x, p=0.5, training=True, inplace=False: (p, training)))
    attend = F.scaled_dot_product_attention
    with_dropout = count(attend, lambda *args, dropout_p=0.0, **kwargs: (dropout_p, True))
    monkeypatch.setattr(F, "scaled_dot_product_attention", with_dropout)
    model.train()(**repeat_batch(batch, 2))
    assert total_calls(audit, PER_COPY) == counted[PER_COPY] > 0
    layer_drop = sum(operation.calls for operation in audit.operations if operation.kind == "LayerDrop")
    assert total_calls(audit, INACTIVE) - layer_drop == counted[INACTIVE]


@pytest.mark.trap(3)
@pytest.mark.parametrize("build", [marian, bart])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.95])
def test_layerdrop_is_shared_and_the_layers_that_it_skips_are_met(build, probability):
    without = audit_masks(build(), batch_for("marian"), measure_variance=False)
    model = build(encoder_layerdrop=probability, decoder_layerdrop=probability)
    audit = audit_masks(model, batch_for("marian"), measure_variance=False)
    layer_drop = {operation.path: operation for operation in audit.shared}
    assert set(layer_drop) == {"model.encoder", "model.decoder"}
    for operation in layer_drop.values():
        assert operation.kind == "LayerDrop"
        assert operation.probability == (probability, probability)
        assert operation.calls == 2  # once a layer
        assert str(operation) in audit.verdict
    assert kinds(without)["LayerDrop"] == INACTIVE
    assert total_calls(audit, PER_COPY) == total_calls(without, PER_COPY)


@pytest.mark.trap(3)
@pytest.mark.parametrize("build", [marian, bart])
def test_layerdrop_alone_makes_all_draws_shared(build):
    audit = audit_masks(build(dropout=0.0, encoder_layerdrop=0.5), batch_for("marian"))
    assert not audit.copies_differ
    with pytest.warns(UserWarning, match="LayerDrop in model.encoder"):
        check_copies_differ(audit)


@pytest.mark.trap(34)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_without_dropout_is_refused(name, attention):
    _, make_batch = MODELS[name]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {"dropout": 0.0}
    audit = audit_masks(MODELS[name][0](attn_implementation=attention, **off), make_batch())
    assert audit.operations
    assert {operation.scope for operation in audit.operations} == {INACTIVE}
    with pytest.raises(IdenticalCopiesError, match=r"p=0"):
        check_copies_differ(audit)


@pytest.mark.trap(34)
def test_lora_dropout_makes_the_copies_of_a_llama_differ():
    audit = audit_masks(lora(llama(dropout=0.0)), batch_for("llama"))
    active = {operation.path.split(".")[-3] for operation in audit.operations if operation.scope == PER_COPY}
    assert active == {"q_proj", "v_proj"}
    check_copies_differ(audit)
    assert "LoRA" in audit.variance_note  # B is 0 at first
    trained = audit_masks(lora(llama(dropout=0.0), init_lora_weights=False), batch_for("llama"))
    shares = [operation.variance_share for operation in trained.operations if operation.scope == PER_COPY]
    assert sum(shares) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("build", [marian, t5, gpt2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_count(build, reentrant):
    model, batch = build(), batch_for(build.__name__)
    want = audit_masks(model, batch, measure_variance=False).operations
    enable_checkpointing(model, use_reentrant=reentrant)
    assert audit_masks(model, batch, measure_variance=False).operations == want


@pytest.mark.trap(3)
@pytest.mark.parametrize(("mode", "scope"), [("row", PER_COPY), ("batch", SHARED)])
def test_stochastic_depth_is_per_copy_by_row_and_shared_by_batch(mode, scope):
    model = ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.3, num_classes=5)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.mode = mode
    active, first_block = audit_masks(model, torch.randn(3, 3, 16, 16)).operations
    assert (active.kind, active.scope, active.calls) == ("stochastic depth", scope, 3)
    assert active.probability == pytest.approx((0.1, 0.3))  # growing with depth
    assert (first_block.scope, first_block.probability) == (INACTIVE, (0.0, 0.0))


def test_stochastic_depth_of_transformers_is_per_copy():
    config = transformers.ConvNextConfig(hidden_sizes=[4] * 4, depths=[1] * 4, drop_path_rate=0.3, image_size=32)
    model = transformers.ConvNextForImageClassification(config)
    audit = audit_masks(model, {"pixel_values": torch.randn(3, 3, 32, 32)})
    assert kinds(audit) == {"stochastic depth": PER_COPY}


class LayerDropped(nn.Module):
    """LayerDrop as several of transformers' encoders have it: it draws first, and then asks whether to skip."""

    def __init__(self, draw, layerdrop):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.draw, self.layerdrop = draw, layerdrop

    def forward(self, x):
        for layer in self.layers:
            skip = self.draw() < self.layerdrop and self.training
            x = x if skip else layer(x)
        return x


DRAWS = {"torch": lambda: torch.rand([]), "python": random.random, "numpy": np.random.rand}


@pytest.mark.trap(3)
@pytest.mark.parametrize("draw", DRAWS)
def test_layerdrop_is_shared_whichever_generator_draws_it(draw):
    (operation,) = audit_masks(LayerDropped(DRAWS[draw], 0.3), torch.randn(3, 5)).operations
    assert (operation.kind, operation.scope, operation.probability) == ("LayerDrop", SHARED, (0.3, 0.3))


@pytest.mark.parametrize("draw", DRAWS)
def test_a_layerdrop_that_draws_and_does_not_use_it_is_inactive(draw):
    (operation,) = audit_masks(LayerDropped(DRAWS[draw], 0.0), torch.randn(3, 5)).operations
    assert (operation.kind, operation.scope, operation.reason) == ("LayerDrop", INACTIVE, "p=0")
    model = nn.Sequential(LayerDropped(DRAWS[draw], 0.3)).train()
    model[0].training = False
    (operation,) = audit_masks(model, torch.randn(3, 5)).operations
    assert (operation.kind, operation.scope, operation.reason) == ("LayerDrop", INACTIVE, "eval mode")


@pytest.mark.trap(3)
def test_specaugment_is_shared_where_one_mask_serves_the_batch_and_per_copy_where_it_is_drawn_by_row():
    class TimeMask(nn.Module):
        def forward(self, spectrogram):  # (B, F, T)
            start = int(torch.randint(spectrogram.shape[-1] - 2, ()))
            keep = torch.ones_like(spectrogram)
            keep[..., start : start + 2] = 0
            return spectrogram * keep

    (time_mask,) = audit_masks(TimeMask(), torch.randn(3, 4, 20)).operations
    assert (time_mask.kind, time_mask.scope) == ("random integers", SHARED)

    audit = audit_masks(wav2vec2(), {"input_values": torch.randn(2, 400)}, measure_variance=False)
    assert kinds(audit)["numpy.random"] == PER_COPY  # transformers draws a mask for each row
    assert kinds(audit)["LayerDrop"] == SHARED


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("options", "dim"), [({"batch_first": True}, 0), ({}, 1), ({"bidirectional": True}, 1)])
def test_dropout_between_recurrent_layers_is_per_copy(kind, options, dim):
    shape = (3, 4, 5) if dim == 0 else (4, 3, 5)
    (operation,) = audit_masks(kind(5, 7, 3, dropout=0.2, **options), torch.randn(shape), 3, dim=dim).operations
    assert (operation.kind, operation.probability) == ("recurrent dropout", (0.2, 0.2))
    assert (operation.scope, operation.calls) == (PER_COPY, 2)  # between three layers
    assert operation.variance_share == pytest.approx(1.0)
    off = audit_masks(kind(5, 7, 2, **options), torch.randn(shape), dim=dim)
    assert [operation.reason for operation in off.operations] == ["p=0"]
    assert not audit_masks(kind(5, 7, 1, **options), torch.randn(shape), dim=dim).operations


def test_recurrent_dropout_over_packed_sequences_is_per_copy_but_not_measured():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 7, 2, dropout=0.2, batch_first=True)

        def forward(self, x):
            lengths = torch.tensor([4, 3, 2]).repeat(len(x) // 3)
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

    audit = audit_masks(Packed(), torch.randn(3, 4, 5))
    (operation,) = audit.operations
    assert (operation.path, operation.kind, operation.scope) == ("lstm", "recurrent dropout", PER_COPY)
    assert operation.variance_share is None
    assert "cannot be told apart by copy" in audit.variance_note


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_drops_per_copy(need_weights, batch_first):
    dim = 0 if batch_first else 1
    x = torch.randn((3, 4, 8) if batch_first else (4, 3, 8))

    def attend(attention, x):
        return attention(x, x, x, need_weights=need_weights)

    on, off = (nn.MultiheadAttention(8, 2, dropout=p, batch_first=batch_first) for p in (0.1, 0.0))
    (operation,) = audit_masks(on, x, forward=attend, dim=dim).operations
    assert (operation.kind, operation.scope, operation.probability) == ("attention dropout", PER_COPY, (0.1, 0.1))
    assert operation.variance_share == pytest.approx(1.0)
    (idle,) = audit_masks(off, x, forward=attend, dim=dim).operations
    assert (idle.kind, idle.scope, idle.reason) == ("attention dropout", INACTIVE, "p=0")
