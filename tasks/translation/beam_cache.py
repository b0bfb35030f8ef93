"""The key-value cache of a beam search over one copy of the model, or over several that go side by side."""

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig


class BeamCache(EncoderDecoderCache):
    """Keys and values of N copies of every beam, copy-major: row n*R + r is copy n of beam r.

    After each step of a beam search the survivors' rows are gathered, here in the decoder's self-attention alone:
    the beams of a sentence attend to the same source, so that its keys and values, most of the cache, are equal in
    all their rows and can stay where they are. Beams never leave their sentence, and rows never leave their copy.

    Args:
        config: the model's.
        num_copies: N; 1 for an ordinary search.
    """

    def __init__(self, config: PreTrainedConfig, num_copies: int = 1) -> None:
        decoder = config.get_text_config(decoder=True)
        super().__init__(DynamicCache(config=decoder), DynamicCache(config=decoder))
        self.num_copies = num_copies

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gather rows: `beam_idx` (R,) names, for every beam, the one that it continues."""
        offsets = len(beam_idx) * torch.arange(self.num_copies, device=beam_idx.device)
        self.self_attention_cache.reorder_cache((offsets[:, None] + beam_idx).flatten())
