"""Drawn images: ten shapes of any colour, size, place and tilt on any ground, 32x32 pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from tasks.vision.data.image_set import ImageSet

SIZE = 32
_SCALE = 4  # drawn so much larger, and reduced
CLASSES = (
    "triangle", "square", "pentagon", "star", "disc", "ring", "cross", "arrow", "crescent", "two discs"
)  # fmt: skip


def draw_images(count: int, seed: int) -> ImageSet:
    """So many images, the classes in turn; a function of the seed."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = np.stack([_draw(int(label), generator) for label in labels])
    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def _draw(label: int, generator: np.random.Generator) -> np.ndarray:
    side = SIZE * _SCALE
    ground, colour = _two_colours(generator)
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for _ in range(int(generator.integers(0, 3))):  # spots behind the shape
        x, y, width, height = generator.integers(0, side, 4)
        draw.ellipse([x - width / 8, y - height / 8, x + width / 8, y + height / 8], fill=_near(colour, generator))
    radius = side * generator.uniform(0.2, 0.36)
    centre = generator.uniform(radius, side - radius, 2)
    tilt = generator.uniform(-0.4, 0.4)
    _shape(draw, CLASSES[label], centre, radius, tilt, colour, ground)
    blurred = image.filter(ImageFilter.GaussianBlur(float(generator.uniform(0, 2))))
    pixels = np.asarray(blurred.resize((SIZE, SIZE), Image.Resampling.BOX)).astype(np.float32)
    noisy = pixels + generator.normal(0, 8, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _shape(
    draw: ImageDraw.ImageDraw,
    name: str,
    centre: np.ndarray,
    radius: float,
    tilt: float,
    colour: tuple[int, ...],
    ground: tuple[int, ...],
) -> None:
    def at(angle: float, distance: float = 1.0) -> tuple[float, float]:
        return (
            centre[0] + radius * distance * math.sin(angle + tilt),
            centre[1] - radius * distance * math.cos(angle + tilt),
        )

    def disc(place: tuple[float, float], size: float, fill: tuple[int, ...]) -> None:
        draw.ellipse([place[0] - size, place[1] - size, place[0] + size, place[1] + size], fill=fill)

    turn = 2 * math.pi
    corners = {"triangle": 3, "square": 4, "pentagon": 5}
    if name in corners:
        draw.polygon([at(turn * i / corners[name]) for i in range(corners[name])], fill=colour)
    elif name == "star":
        draw.polygon([at(turn * i / 10, 0.45 if i % 2 else 1.0) for i in range(10)], fill=colour)
    elif name == "cross":
        for angle in (0.0, turn / 4):
            draw.line([at(angle), at(angle + turn / 2)], fill=colour, width=int(radius * 0.55))
    elif name == "arrow":
        draw.line([at(0.0, 0.9), at(turn / 2)], fill=colour, width=int(radius * 0.35))
        draw.polygon([at(0.0), at(turn * 0.2, 0.8), at(-turn * 0.2, 0.8)], fill=colour)
    elif name == "two discs":
        for angle in (turn / 4, -turn / 4):
            disc(at(angle, 0.55), radius * 0.42, colour)
    else:
        disc((float(centre[0]), float(centre[1])), radius, colour)
        if name == "ring":
            disc((float(centre[0]), float(centre[1])), radius * 0.55, ground)
        if name == "crescent":
            disc(at(turn / 8, 0.5), radius * 0.85, ground)


def _two_colours(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A ground, and a colour that is brighter by enough to be seen."""
    while True:
        ground, colour = generator.integers(0, 256, (2, 3))
        if colour.mean() - ground.mean() > 60:
            return tuple(map(int, ground)), tuple(map(int, colour))


def _near(colour: tuple[int, ...], generator: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(np.clip(value + generator.integers(-60, 61), 0, 255)) for value in colour)
