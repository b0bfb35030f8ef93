"""Search for translations, under any encoder-decoder of transformers."""
