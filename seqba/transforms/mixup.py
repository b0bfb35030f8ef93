"""mixup of a batch that holds copies: partners are other samples, and each copy has a proportion of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seqba.repeat import unfold


def mix_rows(x: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """l * x_n + (1 - l) * x_k for each row n of x (rows, ...), its partner k (rows,) and its share l (rows,)."""
    return torch.lerp(x[partners], x, shares.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))


class Mixup:
    """x = l * x_n + (1 - l) * x_k, and the loss l * loss(y_n) + (1 - l) * loss(y_k), with l ~ Beta(alpha, alpha).

    Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization". As there, one proportion l is drawn for a batch;
    with Batch Augmentation that is one copy of it: each copy draws its own proportion and its own partners. All B
    samples of a copy stand on a random ring, and the next one is a sample's partner: never itself, nor a copy of it.

    Args:
        alpha: above 0; 0.2 in Table 3 of Hoffer et al. 2020.

    Raises:
        ValueError: alpha not above 0.
    """

    def __init__(self, alpha: float) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha must be above 0 and finite, got {alpha}")
        self.alpha = alpha

    def __call__(
        self, images: Tensor, labels: Tensor, copies: tuple[int, ...] = (0,), key: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the rows of a pass.

        Args:
            images: (K*B, ...), copy-major, floating point.
            labels: (K*B,).
            copies: the copies that the rows hold, K.
            key: of the batch, without the copy: what is drawn is a function of it and the copy. None draws from
                torch's generator on the CPU.

        Returns:
            The mixed images, the partners' labels (K*B,), and the share l of a row's own label, (K*B,).

        Raises:
            ValueError: a batch of one sample has no partner; rows that are no multiple of the copies.
        """
        size = unfold(images, len(copies)).shape[1]
        partners, shares = self.draw(size, copies, key)
        partners, shares = partners.to(images.device), shares.to(images)
        return mix_rows(images, partners, shares), labels[partners], shares

    def draw(
        self, size: int, copies: tuple[int, ...] = (0,), key: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Each row's partner, a row of its copy, (K*B,), and the share l of the row itself, (K*B,), on the CPU.

        Args:
            size: B.
            copies, key: as of a call.

        Raises:
            ValueError: a batch of one sample has no partner.
        """
        if size < 2:
            raise ValueError(f"mixup needs at least 2 samples in a batch, got {size}")
        draws = [self._draw(size, None if key is None else (*key, copy)) for copy in copies]
        partners = torch.cat([ring + size * i for i, (ring, _) in enumerate(draws)])
        return partners, torch.tensor([share for _, share in draws]).repeat_interleave(size)

    def _draw(self, size: int, key: tuple[int, ...] | None) -> tuple[Tensor, float]:
        """Each sample's partner, (B,), and the proportion."""
        seed = key if key is not None else (int(torch.randint(2**62, ())),)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([number % 2**64 for number in seed])))
        ring = generator.permutation(size)
        partners = np.empty(size, np.int64)
        partners[ring] = np.roll(ring, -1)
        return torch.from_numpy(partners), float(generator.beta(self.alpha, self.alpha))
