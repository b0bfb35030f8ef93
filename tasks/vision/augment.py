"""The transform T of a run, and the view of an evaluation, from the run's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from seqba.transforms import BatchTransform, Compose, Cutout, Normalize, RandomCrop, RandomHorizontalFlip
from tasks.vision.config import VisionConfig
from tasks.vision.data import ImageSplits

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of its photographs, by channel
_POLICIES = {
    "autoaugment": v2.AutoAugment, "randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide
}  # fmt: skip
_RESIZED = 256 / 224  # an image's shorter side over the square that is cut from its centre


@dataclass(frozen=True)
class Views:
    """How images come to the network.

    Attributes:
        mean, std: of each channel of the training images, where white is 1.
        size: height and width of what the network sees; None for images of one size that are no squares.
        resized: shorter side before the centre is cut out; None where nothing is.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: int | None
    resized: int | None

    @classmethod
    def of(cls, config: VisionConfig, images: ImageSplits) -> Views:
        """The views of a run: statistics of a set that is one tensor, else those of ImageNet."""
        mean: Sequence[float]
        std: Sequence[float]
        mean, std = _IMAGENET
        if (pixels := images.train.tensor) is not None:
            by_channel = [torch.std_mean(channel.float() / 255) for channel in pixels.unbind(1)]
            std, mean = (tuple(map(float, x)) for x in zip(*by_channel, strict=True))
        size = config.image_size
        resized = round(size * _RESIZED) if size is not None and config.random_resized_crop else None
        if size is None and pixels is not None and pixels.shape[2] == pixels.shape[3]:
            size = pixels.shape[2]
        return cls(mean, std, size, resized)

    @property
    def normalize(self) -> Normalize:
        """Bytes to numbers around 0, on whole batches."""
        return Normalize(self.mean, self.std)

    def evaluation(self, image: Tensor) -> Tensor:
        """An image (3, H, W) uint8 as an evaluation sees it, before it is normalised."""
        if self.size is None or (self.resized is None and image.shape[1:] == (self.size, self.size)):
            return image
        if self.resized is None:
            return v2.functional.resize(image, [self.size, self.size], antialias=True)
        return v2.functional.center_crop(
            v2.functional.resize(image, [self.resized], antialias=True), [self.size, self.size]
        )


def device_transform(config: VisionConfig, views: Views) -> BatchTransform:
    """T on whole batches: crop with padding, flip, normalisation, Cutout."""
    steps: list[BatchTransform] = [RandomCrop(config.crop_padding)] if config.crop_padding else []
    steps += [RandomHorizontalFlip()] if config.flip else []
    steps += [views.normalize]
    steps += [Cutout(config.cutout_size)] if config.cutout else []
    return Compose(steps)


def worker_transform(config: VisionConfig, views: Views) -> Callable[[Tensor], Tensor]:
    """T of one image, from torch's global generator, by torchvision; normalised, where Cutout follows."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if config.random_resized_crop:
        steps.append(v2.RandomResizedCrop(views.size, antialias=True))
    elif config.image_size is not None:
        steps.append(v2.Resize([views.size, views.size], antialias=True))
    if config.crop_padding:
        steps.append(_Alone(RandomCrop(config.crop_padding)))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.auto_augment != "none":
        steps.append(_POLICIES[config.auto_augment]())
    if config.cutout:
        steps += [_Alone(views.normalize), _Alone(Cutout(config.cutout_size))]
    return v2.Compose(steps) if steps else torch.clone


def why_not_on_device(config: VisionConfig, images: ImageSplits) -> str | None:
    """The reason why the run cannot transform whole batches on the device; None where it can."""
    if config.image_size is not None:
        return "--image-size resizes images"
    if images.train.tensor is None:
        return "the images are no set of one size that is kept as one tensor"
    if config.random_resized_crop:
        return "--random-resized-crop works image by image"
    return None if config.auto_augment == "none" else f"--auto-augment {config.auto_augment} works image by image"


@dataclass(frozen=True)
class _Alone:
    """A transform of batches, for one image; loaders can send it to their processes."""

    transform: BatchTransform

    def __call__(self, image: Tensor) -> Tensor:
        return self.transform(image[None])[0]
