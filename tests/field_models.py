"""Tiny models of many architectures of transformers, by configuration, each with a batch and a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

WORDS = 37
TEXT: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2,
}  # fmt: skip
_DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.2}
_PAIR: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout": 0.2,
    "attention_dropout": 0.2, "activation_dropout": 0.2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2,
}  # fmt: skip
_AUDIO: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0,
    "hidden_dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2, "feat_proj_dropout": 0.2,
    "vocab_size": WORDS,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": TEXT, "roberta": TEXT, "electra": {**TEXT, "embedding_size": 16}, "camembert": TEXT, "ernie": TEXT,
    "xlm-roberta": TEXT, "data2vec-text": TEXT, "mpnet": TEXT, "megatron-bert": TEXT, "roformer": TEXT,
    "nystromformer": {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 8, "conv_kernel_size": 3},
    "deberta": {**TEXT, "relative_attention": True, "pos_att_type": "c2p|p2c", "max_relative_positions": 16},
    "deberta-v2": {
        **TEXT, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "conv_kernel_size": 3, "conv_act": "gelu", "pos_dropout": 0.2,
    },
    "albert": {**TEXT, "embedding_size": 8},
    "convbert": {**TEXT, "embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3},
    "distilbert": {"vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.2,
                   "attention_dropout": 0.2, "max_position_embeddings": 64},
    "xlm": {"vocab_size": WORDS, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.2, "attention_dropout": 0.2,
            "max_position_embeddings": 64},
    "xlnet": {"vocab_size": WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "dropout": 0.2},
    "ctrl": {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24, "n_positions": 64,
             "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "gpt2": {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.2,
             "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "openai-gpt": {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.2,
                   "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gpt_bigcode": {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.2,
                    "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gptj": {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4,
             "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gpt_neo": {"vocab_size": WORDS, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types":
                [[["global", "local"], 1]], "max_position_embeddings": 64, "resid_dropout": 0.2, "embed_dropout": 0.2,
                "attention_dropout": 0.2},
    "gpt_neox": _DECODER, "llama": _DECODER, "mistral": _DECODER, "qwen2": _DECODER, "gemma": _DECODER,
    "phi": {**_DECODER, "resid_pdrop": 0.2, "embd_pdrop": 0.2}, "stablelm": _DECODER, "starcoder2":
    {**_DECODER, "residual_dropout": 0.2, "embedding_dropout": 0.2}, "olmo": _DECODER,
    "bloom": {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.2,
              "attention_dropout": 0.2},
    "opt": {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.2, "attention_dropout": 0.2},
    "biogpt": TEXT, "xglm": {**TEXT, "d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24,
                             "dropout": 0.2, "attention_dropout": 0.2},
    "mixtral": {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.1},
    "mamba": {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16,
             "intermediate_size": 24, "context_length": 64},
    "bart": _PAIR, "marian": _PAIR, "mbart": _PAIR, "pegasus": _PAIR, "m2m_100": _PAIR, "blenderbot": _PAIR,
    "plbart": _PAIR, "bigbird_pegasus": {**_PAIR, "attention_type": "original_full"}, "led":
    {**_PAIR, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "fsmt": {**_PAIR, "src_vocab_size": WORDS, "tgt_vocab_size": WORDS, "langs": ["en", "de"]},
    "prophetnet": {
        "vocab_size": WORDS, "hidden_size": 16, "num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "dropout": 0.2,
        "attention_dropout": 0.2, "activation_dropout": 0.2, "pad_token_id": 1, "decoder_start_token_id": 0,
        "max_position_embeddings": 64, "ngram": 2,
    },
    "t5": {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
           "dropout_rate": 0.2, "decoder_start_token_id": 0},
    "longt5": {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
               "dropout_rate": 0.2, "decoder_start_token_id": 0, "local_radius": 3},
    "switch_transformers": {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                            "dropout_rate": 0.2, "decoder_start_token_id": 0, "num_experts": 2, "expert_capacity": 64,
                            "router_jitter_noise": 0.1},
    "longformer": {**TEXT, "attention_window": [4, 4]},
    "big_bird": {**TEXT, "attention_type": "original_full"},
    "reformer": {
        "vocab_size": WORDS, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8,
        "feed_forward_size": 24,
        "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
        "axial_pos_shape": [4, 2], "axial_pos_embds_dim": [8, 8], "max_position_embeddings": 8, "is_decoder": False,
        "hidden_dropout_prob": 0.2, "lsh_attention_probs_dropout_prob": 0.2, "local_attention_probs_dropout_prob": 0.2,
        "hash_seed": None,
    },
    "vit": _VISION, "deit": _VISION, "beit": {**_VISION, "drop_path_rate": 0.3},
    "dinov2": {**_VISION, "drop_path_rate": 0.3},
    "vit_mae": {**_VISION, "mask_ratio": 0.5},
    "swin": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
             "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 8], "depths": [1, 1], "image_size": 16, "patch_size": 2,
                 "drop_path_rate": 0.3},
    "segformer": {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
                  "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2],
                  "mlp_ratios": [2, 2], "drop_path_rate": 0.3,
                  "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "wav2vec2": _AUDIO, "hubert": _AUDIO, "unispeech": _AUDIO, "wavlm": _AUDIO,
    "wav2vec2 with masks": {**_AUDIO, "apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 2},
    "marian with layerdrop": {**_PAIR, "encoder_layerdrop": 0.5},
}  # fmt: skip


def tiny(name: str) -> nn.Module:
    """A model of the architecture, in training mode."""
    kind = name.split(" ")[0]
    config = AutoConfig.for_model(kind, **ARCHITECTURES[name])
    torch.manual_seed(0)
    return AutoModel.from_config(config).train()


def batch_of(name: str, size: int, time: int) -> dict[str, Tensor]:
    """B samples for it: pixels, sound, or `time` words (and as many for its decoder)."""
    generator = torch.Generator().manual_seed(size)
    kind = name.split(" ")[0]
    if ARCHITECTURES[name].get("image_size") or kind == "segformer":
        return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}
    if kind in ("wav2vec2", "hubert", "unispeech", "wavlm"):
        return {"input_values": torch.randn(size, 40 * time, generator=generator)}
    words = {"input_ids": torch.randint(3, WORDS, (size, time), generator=generator)}
    if AutoConfig.for_model(kind, **ARCHITECTURES[name]).is_encoder_decoder:
        words["decoder_input_ids"] = torch.randint(3, WORDS, (size, time), generator=generator)
    return words


def loss_of(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """A loss that no symmetry makes small, summed over rows: of the model's first output."""
    hidden = model(**rows)[0]
    weights = torch.linspace(-1, 1, hidden[0].numel(), dtype=hidden.dtype).view_as(hidden[0])
    return F.smooth_l1_loss(hidden * weights, torch.full_like(hidden, 0.3), reduction="sum")
