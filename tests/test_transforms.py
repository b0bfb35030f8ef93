"""Batched transforms against torchvision's, image by image, under the same draws; what keys draw; mixup."""

import math

import pytest
import torch
from torchvision.transforms import v2

from seqba.draws.keyed import keyed_uniform
from seqba.repeat import repeat_batch, unfold
from seqba.transforms import BatchTransform, Compose, Cutout, Mixup, Normalize, RandomCrop, RandomHorizontalFlip

DTYPES = [torch.uint8, torch.float32]


def images(dtype, shape=(7, 3, 9, 11)):
    made = torch.randint(256, shape, dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.to(dtype) / 255


# ---- keys


def all_keys(*sizes):
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))


def test_a_key_draws_what_splitmix64_draws():
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    for key in ((3, -5, 2**62), (0, 0, 0)):
        state = 3
        for column in key:
            state = mix((state + golden) % 2**64 ^ column % 2**64)
        want = [(mix((state + i * golden) % 2**64) >> 40) / 2**24 for i in range(1, 6)]
        assert keyed_uniform(torch.tensor([key]), 5)[0].tolist() == want


def test_draws_are_uniform_over_every_part_of_a_key_and_differ_between_all_keys():
    keys = all_keys(3, 5, 40, 8)  # seeds, epochs, samples, copies
    drawn = keyed_uniform(keys, 6)
    assert len(drawn.flatten().unique()) > 0.998 * drawn.numel()  # 28 800 numbers in 2^24 places
    for values in [drawn.flatten(), *drawn.unbind(1), *(drawn[keys[:, 3] == copy].flatten() for copy in range(8))]:
        count = values.numel()
        observed = torch.histc(values, 16, 0, 1)
        chi = float((observed - count / 16).square().sum() / (count / 16))
        assert chi < 45  # 15 degrees of freedom: 1 in 10 000
        assert abs(float(values.mean()) - 0.5) < 5 / math.sqrt(12 * count)


@pytest.mark.trap(29)
@pytest.mark.parametrize("part", range(4))
def test_draws_of_keys_that_differ_in_one_part_are_independent(part):
    keys = all_keys(4, 6, 50, 5)
    neighbours = keys.clone()
    neighbours[:, part] += 1
    a, b = (keyed_uniform(which, 3) - 0.5 for which in (keys, neighbours))
    count = a.numel()
    correlation = float((a * b).mean() * 12)
    assert abs(correlation) < 4.5 / math.sqrt(count)
    shifted = float((a[:, :-1] * a[:, 1:]).mean() * 12)
    assert abs(shifted) < 4.5 / math.sqrt(count)


def test_keys_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"int64 of shape \(N, k\), got torch.int32 of shape \(2, 3\)"):
        keyed_uniform(torch.zeros(2, 3, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        keyed_uniform(torch.zeros(2, dtype=torch.int64), 1)


# ---- transforms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("padding", "size"), [(2, None), (0, 5), (3, (9, 4)), (4, (17, 1))])
def test_a_crop_is_torchvisions_of_the_padded_image_under_the_same_draw(padding, size, dtype):
    x, transform = images(dtype), RandomCrop(padding, size)
    uniform = torch.rand(7, 2)
    uniform[0], uniform[1] = 0.0, 1 - 2**-24  # both ends
    got = transform.apply(x, uniform)
    height, width = size if isinstance(size, tuple) else (size or 9, size or 11)
    for image, (down, right), crop in zip(x, uniform, got, strict=True):
        padded = v2.functional.pad(image, [padding] * 4)
        top = int(down * (9 + 2 * padding - height + 1))
        left = int(right * (11 + 2 * padding - width + 1))
        assert torch.equal(crop, v2.functional.crop(padded, top, left, height, width))
    assert not torch.equal(got[2], got[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flip_is_torchvisions_of_the_images_that_drew_below_p(dtype):
    x, uniform = images(dtype), torch.tensor([[0.0], [0.29], [0.3], [0.31], [0.9], [0.1], [0.5]])
    got = RandomHorizontalFlip(0.3).apply(x, uniform)
    for i, image in enumerate(x):
        assert torch.equal(got[i], v2.functional.horizontal_flip(image) if i in (0, 1, 5) else image)
    assert torch.equal(RandomHorizontalFlip(0.0)(x), x)
    assert torch.equal(RandomHorizontalFlip(1.0)(x), x.flip(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_cutout_blanks_the_part_of_a_square_that_lies_in_the_image(size, dtype):
    x, uniform = images(dtype), torch.rand(7, 2)
    uniform[0], uniform[1] = 0.0, 1 - 2**-24  # squares over two borders
    before = x.clone()
    got = Cutout(size, fill=3).apply(x, uniform)
    assert torch.equal(x, before)
    for image, (down, right), cut in zip(x, uniform, got, strict=True):
        top, left = int(down * 9) - size // 2, int(right * 11) - size // 2
        want = image.clone()
        want[:, max(0, top) : top + size, max(0, left) : left + size] = 3
        assert torch.equal(cut, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalised_images_are_torchvisions(dtype):
    x, mean, std = images(dtype), [0.49, 0.48, 0.44], [0.25, 0.24, 0.26]
    want = v2.functional.normalize(v2.functional.to_dtype(x, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(Normalize(mean, std)(x), want)
    assert Normalize(mean, std, torch.bfloat16)(x).dtype == torch.bfloat16


STANDARD = Compose([RandomCrop(2), RandomHorizontalFlip(), Normalize([0.5] * 3, [0.25] * 3), Cutout(4)])


@pytest.mark.trap(28)
@pytest.mark.trap(29)
def test_a_key_decides_whatever_else_stands_in_the_batch_and_copies_and_epochs_differ():
    one = images(torch.uint8, (1, 3, 9, 11))
    keys = all_keys(2, 3, 5, 4)  # one image under every seed, epoch, sample and copy
    whole = STANDARD(one.expand(len(keys), -1, -1, -1), keys)
    order = torch.randperm(len(keys))[:37]
    assert torch.equal(STANDARD(one.expand(37, -1, -1, -1), keys[order]), whole[order])
    assert len(whole.flatten(1).unique(dim=0)) > 100  # of 120: some 6 000 transforms are possible


def test_without_keys_each_image_has_its_own_draw_from_torchs_generator():
    x = images(torch.uint8, (1, 3, 9, 11)).expand(30, -1, -1, -1)
    torch.manual_seed(3)
    first = STANDARD(x)
    torch.manual_seed(3)
    assert torch.equal(STANDARD(x), first)
    assert not torch.equal(STANDARD(x), first)
    assert len(first.flatten(1).unique(dim=0)) > 20


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 1, 6, 2), (1, 4, 5, 5)])
def test_images_of_any_size_and_channels_and_memory_format(shape):
    x = images(torch.float32, shape)
    keys = all_keys(shape[0])
    transform = Compose([RandomCrop(1), RandomHorizontalFlip(), Cutout(2)])
    before = x.clone()
    got = transform(x, keys)
    assert got.shape == x.shape
    assert torch.equal(x, before)
    assert torch.equal(transform(x.contiguous(memory_format=torch.channels_last), keys), got)


def test_what_cannot_be_transformed_is_refused():
    with pytest.raises(ValueError, match="padding must be at least 0, got -1"):
        RandomCrop(-1)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        RandomCrop(0, 0)
    with pytest.raises(ValueError, match="a window of 12 pixels does not fit into 9 pixels with 1 on each side"):
        RandomCrop(1, 12)(images(torch.uint8))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Cutout(0)
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got 1.5"):
        RandomHorizontalFlip(1.5)
    with pytest.raises(ValueError, match="std above 0, got"):
        Normalize([0.5], [0.0])
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\), got \(3, 9, 11\)"):
        Cutout(3)(images(torch.uint8)[0])
    with pytest.raises(ValueError, match="7 images, 6 keys"):
        Cutout(3)(images(torch.uint8), all_keys(6))
    with pytest.raises(NotImplementedError):
        BatchTransform().apply(images(torch.uint8), torch.rand(7, 0))


# ---- mixup


def numbered(copies, samples):
    """Rows whose pixels say which sample they are of."""
    values = torch.arange(samples, dtype=torch.float64)
    return repeat_batch(10.0 ** values[:, None, None, None].expand(samples, 1, 2, 2), copies), repeat_batch(
        values.long() + 100, copies
    )


@pytest.mark.trap(30)
@pytest.mark.parametrize(("copies", "samples"), [(1, 2), (3, 5), (4, 2)])
def test_a_partner_is_another_sample_and_each_copy_has_its_own_proportion(copies, samples):
    x, labels = numbered(copies, samples)
    mixed, partner_labels, shares = Mixup(0.4)(x, labels, tuple(range(copies)), key=(3, 4))
    partners = partner_labels - 100
    own = (labels - 100).double()
    want = shares * 10.0**own + (1 - shares) * 10.0 ** partners.double()  # each power is a digit's place
    torch.testing.assert_close(mixed[:, 0, 0, 0], want)
    assert not (partner_labels == labels).any()
    for copy in unfold(partners, copies):
        assert sorted(copy.tolist()) == list(range(samples))
    by_copy = unfold(shares, copies)
    assert (by_copy == by_copy[:, :1]).all()
    assert len(by_copy[:, 0].unique()) == copies


@pytest.mark.trap(30)
def test_what_mixup_draws_is_a_function_of_the_batch_and_the_copy():
    x, labels = numbered(4, 6)
    mixup = Mixup(1.0)
    whole = unfold(mixup(x, labels, (0, 1, 2, 3), key=(7, 2))[0], 4)
    halves = [mixup(x[:12], labels[:12], copies, key=(7, 2))[0] for copies in ((0, 1), (2, 3))]
    assert torch.equal(torch.cat([unfold(half, 2) for half in halves]), whole)
    assert not torch.equal(mixup(x, labels, (0, 1, 2, 3), key=(7, 3))[0], whole.flatten(0, 1))
    torch.manual_seed(0)
    first = mixup(x, labels, (0, 1, 2, 3))[2]
    assert not torch.equal(mixup(x, labels, (0, 1, 2, 3))[2], first)
    torch.manual_seed(0)
    assert torch.equal(mixup(x, labels, (0, 1, 2, 3))[2], first)


def test_proportions_are_of_the_beta_distribution_and_partners_of_all_samples():
    x, labels = numbered(400, 4)
    _, partners, shares = Mixup(0.2)(x, labels, tuple(range(400)), key=(0,))
    shares = unfold(shares, 400)[:, 0]
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))
    assert abs(float(shares.mean()) - 0.5) < 0.1
    assert abs(float(shares.var()) - 1 / (4 * 1.4)) < 0.03
    met = torch.bincount(unfold(partners, 400)[:, 0] - 100, minlength=4)
    assert met[0] == 0
    assert all(100 < count < 170 for count in met[1:])


def test_mixup_of_one_sample_or_with_an_alpha_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples in a batch, got 1"):
        Mixup(0.2)(*numbered(3, 1), copies=(0, 1, 2))
    with pytest.raises(ValueError, match="alpha must be above 0 and finite, got 0"):
        Mixup(0)
