"""The key-value cache of a beam search: over one copy of the model or several, and without beams that are done."""

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig

_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# what `generate` and `forward` call their cache: renamed in transformers 5.24
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"


class BeamCache(EncoderDecoderCache):
    """Keys and values of N copies of every beam, copy-major: row n*R + r is copy n of beam r.

    After each step of a beam search the survivors' rows are gathered, here in the decoder's self-attention alone:
    the beams of a sentence attend to the same source, so that its keys and values, most of the cache, are equal in
    all their rows and can stay where they are. Beams never leave their sentence, and rows never leave their copy.

    `generate(..., **{CACHE: BeamCache(model.config)})` searches with it; N is 1 in an ordinary search.
    """

    def __init__(self, config: PreTrainedConfig, num_copies: int = 1) -> None:
        decoder = config.get_text_config(decoder=True)
        super().__init__(DynamicCache(config=decoder), DynamicCache(config=decoder))
        self.num_copies = num_copies
        self._kept: Tensor | None = None  # beams that have rows, ascending; None: all

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gather rows: `beam_idx` (R,) names, for every beam of the search, the one that it continues."""
        if self._kept is not None:
            beam_idx = torch.searchsorted(self._kept, beam_idx[self._kept].long())
            num_beams = len(self._kept)
        else:
            num_beams = len(beam_idx)
        self.self_attention_cache.reorder_cache(self._of_all_copies(beam_idx, num_beams))

    def keep(self, beams: Tensor) -> None:
        """Drop the rows of all other beams, whole sentences of them; `beams` counts as the search does, ascending."""
        if self._kept is None:
            rows, before = beams, self.self_attention_cache.layers[0].keys.shape[0] // self.num_copies
        else:
            rows, before = torch.searchsorted(self._kept, beams), len(self._kept)
        self.batch_select_indices(self._of_all_copies(rows, before))
        self._kept = beams

    def _of_all_copies(self, rows: Tensor, num_beams: int) -> Tensor:
        """Rows of the first copy -> the same of all N, where a copy has `num_beams` rows."""
        offsets = num_beams * torch.arange(self.num_copies, device=rows.device)
        return (offsets[:, None] + rows).flatten()
