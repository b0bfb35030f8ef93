"""The network that DARTS found on CIFAR-10, second order (Liu et al. 2019, "DARTS", figures 4 and 5)."""

from __future__ import annotations

from tasks.vision.networks.cells import CellNetwork, Genotype

_V2 = Genotype(
    normal=[
        ("separable_3x3", 0), ("separable_3x3", 1), ("separable_3x3", 0), ("separable_3x3", 1),
        ("separable_3x3", 1), ("identity", 0), ("identity", 0), ("dilated_3x3", 2),
    ],
    normal_output=[2, 3, 4, 5],
    reduction=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("identity", 2), ("max_pool_3x3", 1),
        ("max_pool_3x3", 0), ("identity", 2), ("identity", 2), ("max_pool_3x3", 1),
    ],
    reduction_output=[2, 3, 4, 5],
)  # fmt: skip


def darts(num_classes: int, width: int = 36, num_cells: int = 20) -> CellNetwork:
    """3,349,342 parameters with 10 classes, and 476,426 of the auxiliary head."""
    return CellNetwork(_V2, width, num_cells, num_classes)
