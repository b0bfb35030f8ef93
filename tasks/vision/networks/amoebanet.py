"""AmoebaNet-A (Real et al. 2019, "Regularized Evolution for Image Classifier Architecture Search", figure 5)."""

from __future__ import annotations

from tasks.vision.networks.cells import CellNetwork, Genotype

_A = Genotype(
    normal=[
        ("avg_pool_3x3", 0), ("max_pool_3x3", 1), ("separable_3x3", 0), ("separable_5x5", 2), ("separable_3x3", 0),
        ("avg_pool_3x3", 3), ("separable_3x3", 1), ("identity", 1), ("identity", 0), ("avg_pool_3x3", 1),
    ],
    normal_output=[4, 5, 6],
    reduction=[
        ("avg_pool_3x3", 0), ("separable_3x3", 1), ("max_pool_3x3", 0), ("separable_7x7", 2), ("separable_7x7", 0),
        ("avg_pool_3x3", 1), ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("1x7_7x1", 0), ("separable_3x3", 5),
    ],
    reduction_output=[3, 4, 6],
)  # fmt: skip


def amoebanet(num_classes: int, width: int = 128, num_cells: int = 20) -> CellNetwork:
    """18 normal cells and 2 reductions: 37.5 million parameters of width 128, 3.15 of width 36, without the head."""
    return CellNetwork(_A, width, num_cells, num_classes)
