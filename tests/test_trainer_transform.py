"""T on the pixels of a Trainer's images: the law, its draws, what is left alone, and the collator's."""

from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from transformers import Trainer, ViTConfig, ViTForImageClassification

from distributed import run_ranks
from seqba import BatchAugmentationCollator, augment
from seqba.audit import IdenticalCopiesError
from seqba.draws.generators import keyed_generators
from seqba.trainer import BatchAugmentationTrainer
from seqba.transforms import BatchTransform, Compose, EachImage, RandomCrop, RandomHorizontalFlip
from tiny_models import gradients, llama
from trainers import ACCUMULATED, Samples, arguments, assert_close, summary, trainer_gradients

T = Compose([RandomCrop(2), RandomHorizontalFlip()])


def vit(dropout=0.0):
    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return ViTForImageClassification(config)


class Images(torch.utils.data.Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(count, 3, 8, 8, generator=generator)
        self.read = []

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, n):
        self.read.append(n)
        return {"pixel_values": self.pixels[n], "labels": n % 3}


class Kept(BatchTransform):
    """T, with what it was called with."""

    num_draws = T.num_draws

    def __init__(self):
        self.keys, self.seen = [], []

    def __call__(self, images, keys=None):
        self.keys.append(keys)
        self.seen.append(images)
        return T(images, keys)


def by_hand(model, data, num_copies, size=3):
    """The gradient of the mean over all images of an update and all their copies."""
    model.zero_grad()
    total = 0.0
    for shard, first in enumerate(range(0, len(data), size)):
        pixels = data.pixels[first : first + size]
        labels = torch.arange(first, first + len(pixels)) % 3
        for copy in range(num_copies):
            keys = torch.tensor([[42, 1, shard, row, copy] for row in range(len(pixels))])
            logits = model(pixel_values=T(pixels, keys)).logits
            total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (total / (num_copies * len(data))).backward()
    want = gradients(model)
    model.zero_grad()
    return want


@pytest.mark.trap(28)
@pytest.mark.parametrize(("num_copies", "copies_per_pass"), [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_the_gradient_is_the_mean_over_transformed_copies_under_every_plan(num_copies, copies_per_pass, tmp_path):
    model, data = vit(), Images(5)
    want = by_hand(model, data, num_copies)
    options = {"ba_m": num_copies, "copies_per_pass": copies_per_pass, "transform": T, "settings": ACCUMULATED}
    (got,) = trainer_gradients(tmp_path, model, data, collator=default_collate, **options)
    assert_close(got, want)
    assert sorted(data.read) == [0, 1, 2, 3, 4]  # each image is read once


def test_a_trainer_that_is_augmented_later_transforms_too(tmp_path):
    model, data = vit(), Images(3)
    want = by_hand(model, data, 2)
    make = lambda **options: augment(Trainer(**options), ba_m=2, transform=T)  # noqa: E731
    (got,) = trainer_gradients(tmp_path, model, data, collator=default_collate, trainer_class=make)
    assert_close(got, want)


TWO_RANKS = """
import tempfile
from torch.utils.data import default_collate
from distributed import report
from test_trainer_transform import Images, T, vit
from trainers import summary, trainer_gradients

(got,) = trainer_gradients(tempfile.mkdtemp(), vit(), Images(6), collator=default_collate, ba_m=2, transform=T)
report(summary(got))
"""


@pytest.mark.trap(28)
def test_ranks_have_the_draws_of_their_own_batches():
    want = summary(by_hand(vit(), Images(6), 2))
    for got in run_ranks(TWO_RANKS, 2):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-3, atol=1e-5)


@pytest.mark.trap(28)
def test_no_two_rows_of_a_run_share_a_key_and_a_resumed_run_goes_on_with_its_own(tmp_path):
    def keys_of(resume, **more):
        kept = Kept()
        settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
        args = arguments(tmp_path, **settings, **more)
        trainer = BatchAugmentationTrainer(
            model=vit(0.1), args=args, train_dataset=Images(6), data_collator=default_collate, ba_m=2, transform=kept,
            allow_identical_copies=True,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat(kept.keys)

    whole = keys_of(None)
    assert whole.shape == (2 * 6 * 2, 5)
    assert len(whole.unique(dim=0)) == len(whole)
    assert whole[:, 1].unique().tolist() == [1, 2]
    assert torch.equal(keys_of(str(tmp_path / "checkpoint-1")), whole[12:])


def test_evaluation_and_prediction_see_plain_images(tmp_path):
    kept, data = Kept(), Images(4)
    trainer = BatchAugmentationTrainer(
        model=vit(), args=arguments(tmp_path), train_dataset=data, eval_dataset=data, data_collator=default_collate,
        ba_m=2, transform=kept,
    )  # fmt: skip
    trainer.evaluate()
    predicted = trainer.predict(data).predictions
    assert not kept.seen
    with torch.no_grad():
        want = trainer.model(pixel_values=data.pixels).logits
    torch.testing.assert_close(torch.tensor(predicted), want, rtol=1e-4, atol=1e-5)


def test_a_t_that_changes_nothing_is_refused_and_one_that_seldom_does_is_not(tmp_path):
    options = {"data": Images(1), "collator": default_collate, "ba_m": 2}
    with pytest.raises(IdenticalCopiesError):
        trainer_gradients(tmp_path, vit(), transform=RandomCrop(0), **options)
    for seed in range(8):
        trainer_gradients(tmp_path, vit(), transform=RandomHorizontalFlip(), settings={"seed": seed}, **options)


class OfPixels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 1)

    def forward(self, pixels, labels):
        return {"loss": self.layer(pixels.flatten(1)).mean()}


def test_a_batch_without_images_is_named(tmp_path):
    data = [{"pixels": torch.zeros(3, 8, 8), "labels": 0}] * 2
    with pytest.raises(ValueError, match=r"images of a batch under 'pixel_values', which has pixels, labels"):
        trainer_gradients(tmp_path, OfPixels(), data, collator=default_collate, ba_m=2, transform=T)


def test_token_models_have_no_images_to_transform(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\)"):
        trainer_gradients(tmp_path, llama(0.1), Samples("llama", 3), ba_m=2, transform=T)


# ---- torchvision's transforms


def test_each_image_is_a_function_of_its_key_and_leaves_the_generators_alone():
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    transform = EachImage(v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.RandAugment()]))
    keys = torch.arange(12).view(6, 2)
    before = torch.get_rng_state()
    whole = transform(images, keys)
    assert torch.equal(torch.get_rng_state(), before)
    assert whole.shape == (6, 3, 8, 8)
    assert torch.equal(transform(images[3:], keys[3:]), whole[3:])
    assert not torch.equal(transform(images, keys + 1), whole)
    same = transform(images[:1].expand(6, -1, -1, -1), keys)
    assert len({one.numpy().tobytes() for one in same}) == 6


def test_each_image_calls_the_transform_under_the_key_that_it_is_given():
    images, uniform = torch.rand(3, 3, 8, 8), torch.tensor([[0, 1], [7, 2], [5, 2**24 - 1]]) * 2**-24
    crop = v2.RandomCrop(8, padding=8)
    got = EachImage(crop).apply(images, uniform)
    for image, made, key in zip(images, got, ((0, 1), (7, 2), (5, 2**24 - 1)), strict=True):
        with keyed_generators(*key):
            assert torch.equal(made, crop(image))


def test_each_image_stands_in_a_chain():
    images, keys = torch.rand(4, 3, 8, 8), torch.arange(4)[:, None]
    chain = Compose([RandomHorizontalFlip(0.5), EachImage(lambda image: image + torch.rand(()))])
    assert chain.num_draws == 3
    one, other = chain(images, keys), chain(images, keys)
    assert torch.equal(one, other)
    assert len({float(x) for x in (one - images).flatten(1).amax(1)}) == 4


# ---- the collator


def test_a_collator_transforms_each_copy_of_a_sample_anew():
    data = Images(4)
    drawn = []

    def shifted(sample):
        drawn.append(float(torch.rand(())))
        return {"pixel_values": sample.pop("pixel_values") + drawn[-1], **sample}

    collate = BatchAugmentationCollator(default_collate, 3, transform=shifted)
    (batch,) = DataLoader(data, batch_size=4, collate_fn=collate)
    assert data.read == [0, 1, 2, 3]
    want = data.pixels.repeat(3, 1, 1, 1) + torch.tensor(drawn).view(-1, 1, 1, 1)
    torch.testing.assert_close(batch["pixel_values"], want)
    assert batch["labels"].tolist() == [0, 1, 2, 0] * 3
    assert all(a != b for a, b in pairwise(sorted(drawn)))


def test_a_collator_transforms_a_single_copy_too():
    collate = BatchAugmentationCollator(default_collate, 1, transform=lambda x: x + 1)
    assert collate([1, 2]).tolist() == [2, 3]
