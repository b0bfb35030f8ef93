"""The cost of image classification, as ratios: the rows of `benchmark.py vision`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from tasks.benchmark.options import BenchmarkOptions
from tasks.benchmark.ratios import Row, compare, wait_for_device
from tasks.benchmark.updates import OwnUpdates, fused_over_single
from tasks.cli.errors import UserError
from tasks.cli.machine import start_accelerator
from tasks.cli.options import option
from tasks.run.stream import BatchStream
from tasks.vision.augment import Views
from tasks.vision.config import VisionOptions, parse_config
from tasks.vision.data import ImageSplits, load_images
from tasks.vision.train import build, make_pipeline, make_stream, training

ROWS = ("loader", "bare", "device", "fused", "repeated")
_NEVER = 1_000_000_000
_SIZE = (500, 375)  # of a photograph of ImageNet
_PHOTOGRAPHS = {"train": 64, "val": 2, "test": 2}  # of each of two classes


@dataclass(frozen=True)
class VisionBenchmark(BenchmarkOptions):
    """Options of the benchmark: drawn images of 32 x 32 pixels in memory, and JPEGs of the size of photographs."""

    network: str = option("resnet44", "of the rows bare, device and fused, on 32 x 32 pixels")
    photo_network: str = option("torchvision/mobilenet_v3_small", "of the row repeated, on photographs")
    photo_size: int = option(160, "height and width that the network sees of them")
    rows: list[str] = option(list(ROWS), "what is measured", choices=ROWS)
    ba_m: int = option(8, "M of the row fused")
    batch_size: int = option(64, "B of the rows on 32 x 32 pixels")
    photo_batch_size: int = option(16, "B of the rows on photographs")
    num_workers: int = option(0, "processes that decode photographs")
    updates: int = option(8, "updates in one timing")
    pairs: int = option(5, "timed pairs, A B A B")

    def __post_init__(self) -> None:
        self.check(batch_size=1, photo_batch_size=4, photo_size=8, num_workers=0)

    def training(self, **changes: Any) -> VisionOptions:
        """The run whose updates are timed, on drawn images: it never validates or saves."""
        common = {
            "network": self.network, "batch_size": self.batch_size, "epochs": None, "max_updates": _NEVER,
            "eval_every": _NEVER, "save_every": _NEVER, "log_every": _NEVER, "ba_m": 1,
            "mixed_precision": self.mixed_precision, "cpu": self.cpu,
        }  # fmt: skip
        return parse_config([]).changed(**common | changes)

    def photographs(self, **changes: Any) -> VisionOptions:
        """The same on photographs: random resized crop and flip."""
        own = {
            "network": self.photo_network, "batch_size": self.photo_batch_size, "data": str(self._folder()),
            "image_size": self.photo_size, "random_resized_crop": True, "crop_padding": 0, "cutout": False,
            "num_workers": self.num_workers, "channels_last": True,
        }  # fmt: skip
        return self.training(**own | changes)

    def _folder(self) -> Path:
        """Class folders of JPEGs of smooth noise, which pack as photographs do."""
        folder = Path(self.cache_dir, "photographs")
        generator = torch.Generator().manual_seed(0)
        for (split, count), name in itertools.product(_PHOTOGRAPHS.items(), ("a", "b")):
            own = folder / split / name
            own.mkdir(parents=True, exist_ok=True)
            for path in (own / f"{i}.jpg" for i in range(count)):
                if not path.exists():
                    small = torch.rand(1, 3, _SIZE[1] // 8, _SIZE[0] // 8, generator=generator)
                    pixels = F.interpolate(small, _SIZE[::-1], mode="bicubic")[0].clamp(0, 1)
                    pixels = (pixels * 245 + 10 * torch.rand(pixels.shape, generator=generator)).to(torch.uint8)
                    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)
        return folder


class BareUpdates:
    """A plain PyTorch loop: the network on batches that lie in memory, or that a loader gives."""

    def __init__(self, options: VisionOptions, num_classes: int, batches: Any) -> None:
        self._accelerator = start_accelerator(options.machine, seed=options.run.seed)
        self._batches = iter(batches)
        self._model = build(options.config, num_classes, options.run.seed).to(self._accelerator.device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def advance(self, count: int) -> None:
        """Do `count` updates; the device has finished then."""
        for images, labels in itertools.islice(self._batches, count):
            self._update(images.to(self._accelerator.device), labels.to(self._accelerator.device))
        wait_for_device()

    def _update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with self._accelerator.autocast():
            loss = F.cross_entropy(self._model(images), labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class Loading:
    """The batches of a training run, and nothing else."""

    def __init__(self, options: VisionOptions) -> None:
        accelerator, images = _prepared(options)
        group = options.group(accelerator)
        self.pipeline = make_pipeline(options, accelerator, images, Views.of(options.config, images), group.copies)
        self.stream: BatchStream = make_stream(options, accelerator, self.pipeline, group)

    def advance(self, count: int) -> None:
        """Load `count` batches."""
        for _ in range(count):
            self.stream.take(1)


def loader(config: VisionBenchmark) -> list[Row]:
    """Seconds to load an update's images, decoded once and transformed ten times, over those of M = 1."""
    many, one = Loading(config.photographs(ba_m=10)), Loading(config.photographs())
    once = compare(lambda: many.advance(1), lambda: one.advance(1), pairs=config.pairs, warm_up=1)
    repeated = compare(lambda: one.advance(10), lambda: many.advance(1), pairs=config.pairs, warm_up=1)
    return [
        once.row("loader seconds of an update of photographs, M=10 over M=1", "at most 4"),
        repeated.row("the data set repeated 10 times over M=10, loader seconds", "at least 2"),
    ]


def bare(config: VisionBenchmark) -> list[Row]:
    """Images a second of the training script over those of a bare loop on a tensor in memory."""
    options = config.training()
    accelerator, images = _prepared(options)
    assert images.train.tensor is not None
    pixels = Views.of(options.config, images).normalize(images.train.tensor).to(accelerator.device)
    labels = images.train.labels.to(accelerator.device)
    whole = len(pixels) - len(pixels) % config.batch_size
    batches = zip(pixels[:whole].split(config.batch_size), labels[:whole].split(config.batch_size), strict=True)
    loop = BareUpdates(options, len(images.classes), itertools.cycle(list(batches)))
    own = OwnUpdates(training, options)
    ratio = compare(
        lambda: loop.advance(config.updates), lambda: own.advance(config.updates), pairs=config.pairs, warm_up=1
    )
    own.close()
    return [ratio.row(f"images/s of {config.network}, M=1, over a bare loop on a tensor in memory", "at least 0.97")]


def device(config: VisionBenchmark) -> list[Row]:
    """The share of an update that T takes on the device."""
    options = config.training()
    loading, own = Loading(options), OwnUpdates(training, options)
    batches = [loading.stream.take(1)[0] for _ in range(config.updates)]

    def transform() -> None:
        for batch in batches:
            loading.pipeline.take_copies(batch, (0,))
        wait_for_device()

    ratio = compare(transform, lambda: own.advance(config.updates), pairs=config.pairs, warm_up=1)
    own.close()
    return [ratio.row("share of an update that T takes on the device, M=1", "at most 0.05 on CPU")]


def fused(config: VisionBenchmark) -> list[Row]:
    """One fused update of M copies against M updates of one."""
    many = OwnUpdates(training, config.training(ba_m=config.ba_m, copies_per_pass=config.ba_m))
    return fused_over_single(config, many, OwnUpdates(training, config.training()), "at most 1.0 on CPU")


def repeated(config: VisionBenchmark) -> list[Row]:
    """Images a second, M = 4, over a loop fed by timm's repeated augmentation, 4 repeats, on the same photographs.

    Raises:
        UserError: timm is not installed.
    """
    try:
        from timm.data import create_transform
        from timm.data.distributed_sampler import RepeatAugSampler
    except ImportError as error:
        raise UserError("the row repeated needs timm: pip install timm") from error
    options = config.photographs(ba_m=4)
    transform = create_transform(config.photo_size, is_training=True, color_jitter=None)
    data = ImageFolder(str(Path(str(options.config.data), "train")), transform=transform)
    sampler = RepeatAugSampler(data, num_replicas=1, rank=0, num_repeats=4, selected_round=0, selected_ratio=0)
    rows = 4 * config.photo_batch_size
    batches = DataLoader(data, rows, sampler=sampler, num_workers=config.num_workers, drop_last=True)
    loop = BareUpdates(options, 2, itertools.chain.from_iterable(itertools.repeat(batches)))
    own = OwnUpdates(training, options)
    ratio = compare(
        lambda: loop.advance(config.updates), lambda: own.advance(config.updates), pairs=config.pairs, warm_up=1
    )
    own.close()
    name = f"images/s of {config.photo_network}, M=4, over a loop fed by timm's RepeatAugSampler"
    return [ratio.row(name, "at least 1.2")]


def _prepared(options: VisionOptions) -> tuple[Accelerator, ImageSplits]:
    accelerator = start_accelerator(options.machine, seed=options.run.seed)
    return accelerator, load_images(
        options.config.data,
        valid_images=options.config.valid_images,
        in_memory=options.config.image_size is None,
    )


MEASUREMENTS: dict[str, Callable[[VisionBenchmark], list[Row]]] = {
    row.__name__: row for row in (loader, bare, device, fused, repeated)
}
