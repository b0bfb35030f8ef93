"""The presets of a vision run: options by name. Any option overrides them."""

from __future__ import annotations

from typing import Any

# M, batch, regime and augmentation of Table 2 (Hoffer et al. 2020) and of the papers it cites; epochs as published.
# 5 000 images of a CIFAR training set are held out: no checkpoint is chosen on the test set.
_CIFAR: dict[str, Any] = {
    "max_updates": 10_000_000, "eval_every": 700, "save_every": 700, "valid_images": 5_000,
    "crop_padding": 4, "flip": True, "cutout": True,
    "cutout_size": 16,
}  # fmt: skip
_RESNET44 = _CIFAR | {
    "network": "resnet44", "ba_m": 40, "batch_size": 64, "epochs": 100.0, "learning_rate": 0.1, "weight_decay": 1e-4,
    "lr_drops": [81.0, 122.0, 164.0], "lr_factors": [0.1],
}  # fmt: skip
_VGG16 = _CIFAR | {
    "network": "vgg16-cifar", "ba_m": 32, "batch_size": 128, "epochs": 200.0, "learning_rate": 0.1,
    "weight_decay": 5e-4, "decay_bias_and_norm": True, "lr_drops": [60.0, 120.0, 160.0], "lr_factors": [0.2],
}  # fmt: skip
_WRN = _VGG16 | {"network": "wrn28-10"}
_DENSENET = _CIFAR | {
    "network": "densenet100-12", "ba_m": 4, "batch_size": 64, "epochs": 300.0, "learning_rate": 0.1,
    "weight_decay": 1e-4, "decay_bias_and_norm": True, "lr_drops": [150.0, 225.0], "lr_factors": [0.1],
}  # fmt: skip
_CELLS = _CIFAR | {
    "batch_size": 128, "ba_m": 8, "epochs": 600.0, "learning_rate": 0.025, "lr_decay": "cosine", "weight_decay": 3e-4,
    "drop_path": 0.2,
}  # fmt: skip
_AMOEBANET = _CELLS | {"network": "amoebanet"}
_IMAGENET: dict[str, Any] = {
    "max_updates": 10_000_000, "eval_every": 5_000, "save_every": 5_000,
    "image_size": 224, "crop_padding": 0, "random_resized_crop": True, "flip": True, "cutout": False, "ba_m": 4,
    "batch_size": 256, "learning_rate": 0.1, "weight_decay": 1e-4, "decay_bias_and_norm": True, "epochs": 90.0,
    "lr_drops": [30.0, 60.0, 80.0], "lr_factors": [0.1], "num_workers": 8, "valid_images": 10_000,
}  # fmt: skip
_RESNET50 = _IMAGENET | {"network": "torchvision/resnet50"}

PRESETS: dict[str, dict[str, Any]] = {
    "generated": {"cutout_size": 4, "lr_drops": [55.0, 75.0], "max_updates": 500},
    "resnet44-cifar10": _RESNET44,
    "resnet44-cifar100": _RESNET44,
    # half of the iterations: the paper has a larger rate and faster drops, and does not say which
    "resnet44-cifar10-23-epochs": _RESNET44 | {
        "ba_m": 10, "epochs": 23.0, "learning_rate": 0.2, "lr_drops": [15.0, 20.0],
    },
    "vgg16-cifar10": _VGG16,
    "vgg16-cifar100": _VGG16,
    "wrn28-10-cifar10": _WRN | {"ba_m": 6},
    "wrn28-10-cifar100": _WRN | {"ba_m": 10},
    "densenet100-12-cifar100": _DENSENET,
    "darts-cifar10": _CELLS | {"network": "darts", "batch_size": 96},
    "amoebanet-cifar10": _AMOEBANET,
    # "without any modification to the LR schedule" (section 4.1): 14 epochs of 351 updates, of 600
    "amoebanet-cifar10-14-epochs": _AMOEBANET | {"ba_m": 12, "max_updates": 4_914},
    # Table 3
    "resnet44-cifar10-mixup": _RESNET44 | {"ba_m": 10, "epochs": 200.0, "mixup_alpha": 0.2},
    "wrn28-10-cifar10-mixup": _WRN | {"ba_m": 10, "mixup_alpha": 0.2},
    "wrn28-10-cifar100-mixup": _WRN | {"ba_m": 10, "mixup_alpha": 0.2},
    "resnet50-imagenet-mixup": _RESNET50 | {"mixup_alpha": 0.2},
    "alexnet-imagenet": _IMAGENET | {
        "network": "torchvision/alexnet", "ba_m": 8, "epochs": 30.0, "learning_rate": 0.01, "weight_decay": 5e-4,
        "weight_decay_epochs": 15.0, "lr_drops": [10.0, 15.0, 20.0, 25.0], "lr_factors": [0.5, 0.2, 0.5, 0.2],
    },
    "mobilenet-imagenet": _IMAGENET | {"network": "mobilenet-v1"},
    "resnet50-imagenet": _RESNET50,
    "resnet50-imagenet-40-epochs": _RESNET50 | {"epochs": 40.0, "lr_drops": [30.0, 35.0]},
    "resnet50-imagenet-23-epochs": _RESNET50 | {"epochs": 23.0, "lr_drops": [15.0, 20.0, 22.0]},
    # B = 8192 on one rank, --batch-size times --accumulation; on R ranks --accumulation is 128 / R
    "resnet50-imagenet-large-batch": _RESNET50 | {
        "batch_size": 64, "accumulation": 128, "learning_rate": 3.2, "warmup_epochs": 5.0, "ghost_batch_size": 32,
        "eval_every": 150, "save_every": 150,
    },
}  # fmt: skip

# Top-1 accuracy in per cent: Tables 2 and 3 of Hoffer et al. 2020. Table 3 has no figure of fixed samples.
PAPER: dict[str, tuple[str, str, str]] = {
    "resnet44-cifar10": ("93.70", "93.80", "95.43"),
    "vgg16-cifar10": ("93.82", "94.49", "95.32"),
    "wrn28-10-cifar10": ("96.60", "96.60", "97.15"),
    "darts-cifar10": ("97.65", "97.63", "97.85"),
    "amoebanet-cifar10": ("98.16", "98.10", "98.24"),
    "resnet44-cifar100": ("72.97", "70.30", "74.13"),
    "vgg16-cifar100": ("73.03", "67.20", "75.50"),
    "wrn28-10-cifar100": ("79.85", "80.12", "83.45"),
    "densenet100-12-cifar100": ("77.73", "75.35", "78.80"),
    "alexnet-imagenet": ("58.25", "57.60", "62.31"),
    "mobilenet-imagenet": ("70.60", "69.50", "71.40"),
    "resnet50-imagenet": ("76.30", "75.70", "76.86"),
    "resnet44-cifar10-mixup": ("94.60", "-", "95.55"),
    "wrn28-10-cifar10-mixup": ("97.30", "-", "97.80"),
    "wrn28-10-cifar100-mixup": ("82.5", "-", "84.3"),
    "resnet50-imagenet-mixup": ("76.70", "-", "77.04"),
}


def presets_table() -> str:
    """The presets as lines of text: network, M, regime, and the paper's figures: fixed steps, fixed samples, BA."""
    rows = [("preset", "network", "M", "regime", "paper: fixed steps", "fixed samples", "BA")]
    for name, preset in PRESETS.items():
        epochs = f"{preset['epochs']:g} epochs, " if "epochs" in preset else ""
        decay = preset.get("lr_decay", f"drops at {' '.join(f'{drop:g}' for drop in preset.get('lr_drops', ()))}")
        regime = f"{epochs}B {preset.get('batch_size', 64)}, lr {preset.get('learning_rate', 0.1):g}, {decay}"
        network, num_copies = preset.get("network", "resnet8"), preset.get("ba_m", 1)
        rows.append((name, network, str(num_copies), regime, *PAPER.get(name, ("-",) * 3)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# The folder below $SEQBA_DATA that is taken where --data is not given.
DATA = {name: "cifar10" for name in PRESETS if "cifar10" in name.split("-")}
