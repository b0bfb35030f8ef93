"""Embedding dropout: whole words of the vocabulary are missing for the length of a forward pass."""

from torch import Tensor, nn

from seqba.modules.mask_scope import MaskScope, check_masks, dropout_masks
from seqba.repeat import unfold


def embedding_dropout(
    embedded: Tensor, input_ids: Tensor, vocab_size: int, p: float, mask_scope: MaskScope, training: bool
) -> Tensor:
    """Zero the vectors of a share p of the vocabulary, wherever these words stand, and scale the rest by 1 / (1 - p).

    Equal to looking words up in an embedding matrix whose rows are dropped (Gal and Ghahramani 2016; Merity et al.
    2018, §4.3), without the copy of the matrix: the factor of a word is looked up instead.

    Scope of the mask: `shared`, (V,) for all rows of the pass; `per_copy`, one (V,) for each copy's rows.

    Args:
        embedded: (rows, T, width), the vectors of `input_ids`.
        input_ids: (rows, T), copy-major where a pass of copies runs.
        vocab_size: V.
        p: probability of zeroing a word, in [0, 1).
        mask_scope: whether the copies of a pass share the mask.
        training: whether to drop at all; otherwise `embedded` is returned.

    Raises:
        ValueError: `per_copy`, and the rows are no multiple of the pass's copies.
    """
    if not training or p == 0:
        return embedded
    masks = dropout_masks(embedded.new_empty(vocab_size), p, mask_scope)
    factors = masks.gather(1, unfold(input_ids, len(masks)).flatten(1))
    return embedded * factors.view(*input_ids.shape, 1)


class EmbeddingDropout(nn.Module):
    """`embedding_dropout` as a layer behind an `nn.Embedding`, which it leaves as it is.

    Args:
        p: probability of zeroing a word, in [0, 1).
        mask_scope: `shared`: the copies of a pass miss the same words; `per_copy`: each its own.

    Raises:
        ValueError: p outside [0, 1), or an unknown scope.
    """

    mask_kind = "embedding dropout"

    def __init__(self, p: float, mask_scope: MaskScope = "per_copy") -> None:
        super().__init__()
        check_masks(p, mask_scope)
        self.p, self.mask_scope = p, mask_scope

    def forward(self, embedded: Tensor, input_ids: Tensor, vocab_size: int) -> Tensor:
        """Drop words: vectors (rows, T, width) of `input_ids` (rows, T) out of V."""
        return embedding_dropout(embedded, input_ids, vocab_size, self.p, self.mask_scope, self.training)

    def extra_repr(self) -> str:
        """Probability and scope, as `print` shows them."""
        return f"p={self.p}, mask_scope={self.mask_scope}"
