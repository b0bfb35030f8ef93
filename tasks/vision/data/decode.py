"""From an image file of any kind to red, green and blue bytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tasks.cli.errors import DataError, reason_of

_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode_file(path: Path) -> Tensor:
    """`decode_image` of a file."""
    return decode_image(path, str(path))


def decode_image(source: Any, called: str) -> Tensor:
    """Read an image from a path or an open file, (3, H, W) uint8.

    Raises:
        DataError: it cannot be decoded; the message says what it is `called`, and the reason.
    """
    try:
        with Image.open(source) as image:
            return to_tensor(image)
    except Exception as error:  # of the decoders: a dozen unrelated types
        raise DataError(f"{called} cannot be decoded: {reason_of(error)}") from error


def to_tensor(image: Any) -> Tensor:
    """A PIL image as (3, H, W) uint8, turned as its EXIF data says; in memory pixel by pixel, which resizes fastest.

    Grey images have three equal channels. 16-bit grey keeps its upper 8 bits. What is transparent is laid over white.
    CMYK and other colour spaces become RGB.

    Raises:
        ValueError: an image without pixels, or of floating-point or 32-bit numbers, whose range nobody knows.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BITS:
        low, high = image.getextrema()
        if not 0 <= low <= high < 2**16 or high < 2**8:  # else nobody knows their range
            raise ValueError(f"its pixels are numbers of more than 8 bits, {low} to {high}; convert it to 8 bits")
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes with transparency, which was seen to
        pixels = np.array(image.convert("RGB"))
    if not pixels.size:
        raise ValueError(f"it has no pixels: {image.size[0]} x {image.size[1]}")
    return torch.from_numpy(pixels).permute(2, 0, 1)
