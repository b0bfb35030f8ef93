"""Transformer-base's family, said in transformers' words: an encoder-decoder `MarianMTModel`."""

from transformers import MarianConfig, MarianMTModel


def build_model(
    *,
    vocab_size: int,
    width: int,
    ffn_width: int | None = None,
    num_layers: int,
    num_heads: int,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    activation_dropout: float = 0.1,
    pad_token_id: int,
    eos_token_id: int,
    max_length: int,
) -> MarianMTModel:
    """The Transformer of Vaswani et al. 2017 as a `MarianMTModel` with new weights.

    Post-norm, ReLU, sinusoidal positions, embeddings times sqrt(D), all three embeddings tied. Four dropouts are
    set, each on its own: embeddings and residual branches (`dropout`), attention weights, and inside the
    feed-forward layers; they are the random transform T of Batch Augmentation. `init_std` is D^-0.5, so that the
    scaled embeddings and the tied output layer start at unit scale (transformers' 0.02 learns slowly).

    Args:
        width, ffn_width: D, and the inner width of the feed-forward layers, by default 4 D.
        num_layers: of the encoder, and of the decoder.
        pad_token_id: also starts the decoder.
        max_length: positions; the longest sentence in pieces, on either side.
    """
    ffn_width = 4 * width if ffn_width is None else ffn_width
    config = MarianConfig(
        vocab_size=vocab_size, d_model=width, max_position_embeddings=max_length, init_std=width**-0.5,
        encoder_layers=num_layers, encoder_attention_heads=num_heads, encoder_ffn_dim=ffn_width, encoder_layerdrop=0.0,
        decoder_layers=num_layers, decoder_attention_heads=num_heads, decoder_ffn_dim=ffn_width, decoder_layerdrop=0.0,
        dropout=dropout, attention_dropout=attention_dropout, activation_dropout=activation_dropout,
        activation_function="relu", scale_embedding=True,
        share_encoder_decoder_embeddings=True, tie_word_embeddings=True,
        pad_token_id=pad_token_id, decoder_start_token_id=pad_token_id,
        bos_token_id=None, eos_token_id=eos_token_id, forced_eos_token_id=None,
    )  # fmt: skip
    return MarianMTModel(config)
