"""Unmodified transformers models with random weights, small enough for a law to be tested in milliseconds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from seqba.loss import count_targets, token_cross_entropy

VOCABULARY = 61


def marian(dropout: float = 0.2, **more: Any) -> PreTrainedModel:
    return MarianMTModel(_bart_like(MarianConfig, dropout, **more))


def bart(dropout: float = 0.2, **more: Any) -> PreTrainedModel:
    return BartForConditionalGeneration(_bart_like(BartConfig, dropout, bos_token_id=2, **more))


def t5(dropout: float = 0.2, **more: Any) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        **more,
    )
    return T5ForConditionalGeneration(config)


def gpt2(dropout: float = 0.2, **more: Any) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        **more,
    )
    return GPT2LMHeadModel(config)


def llama(dropout: float = 0.2, **more: Any) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        **more,
    )
    return LlamaForCausalLM(config)


def mixtral(dropout: float = 0.2) -> PreTrainedModel:
    """A mixture of experts whose loss has an auxiliary part."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        attention_dropout=dropout,
        output_router_logits=True,
        router_aux_loss_coef=0.001,
    )
    return MixtralForCausalLM(config)


def mbart(dropout: float = 0.2) -> PreTrainedModel:
    return MBartForConditionalGeneration(_bart_like(MBartConfig, dropout))


def m2m100(dropout: float = 0.2) -> PreTrainedModel:
    return M2M100ForConditionalGeneration(_bart_like(M2M100Config, dropout))


def pegasus(dropout: float = 0.2) -> PreTrainedModel:
    return PegasusForConditionalGeneration(_bart_like(PegasusConfig, dropout))


def fsmt(dropout: float = 0.2) -> PreTrainedModel:
    sizes = {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "pad_token_id": 1}
    return FSMTForConditionalGeneration(_bart_like(FSMTConfig, dropout, **sizes))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "marian": marian,
    "bart": bart,
    "t5": t5,
    "gpt2": gpt2,
    "llama": llama,
}
SEQ2SEQ = ("marian", "bart", "t5")
OTHER_ENCODER_DECODERS: dict[str, Callable[..., PreTrainedModel]] = {
    "mbart": mbart, "m2m100": m2m100, "pegasus": pegasus, "fsmt": fsmt
}  # fmt: skip
EVERY_FAMILY = {**FAMILIES, **OTHER_ENCODER_DECODERS}


def batch_for(family: str, num_samples: int = 3, *, seed: int = 0) -> dict[str, Tensor]:
    """A ragged batch: S = 7, and T = 5 for encoder-decoders; sample n is n tokens shorter."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (num_samples, 7), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = torch.randint(3, VOCABULARY, (num_samples, 5), generator=generator)
    if family not in SEQ2SEQ:
        labels = input_ids.clone()
    for n in range(num_samples):
        cut = n % 4
        attention_mask[n, 7 - cut :] = 0
        labels[n, labels.shape[1] - cut :] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def summed_nll(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
    """Summed nats over the targets: labels as they stand (encoder-decoders), shifted by one (causal models)."""
    logits = model(**batch, use_cache=False).logits
    labels = batch["labels"]
    if logits.shape[1] == batch["input_ids"].shape[1] and labels.shape == batch["input_ids"].shape:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return token_cross_entropy(logits, labels, label_smoothing=label_smoothing)


def count(batch: dict[str, Tensor]) -> Tensor:
    """The targets that `summed_nll` sums over."""
    causal = batch["labels"].shape == batch["input_ids"].shape
    return count_targets(batch["labels"][:, 1:] if causal else batch["labels"])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient, by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def enable_checkpointing(model: PreTrainedModel, *, use_reentrant: bool) -> None:
    """Gradient checkpointing, under the name that this version of transformers gives it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def _bart_like(config: type, dropout: float, **more: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": dropout,
        "encoder_layerdrop": 0.0,  # M2M100's own default is 0.05
        "decoder_layerdrop": 0.0,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
    return config(**{**settings, **more})
