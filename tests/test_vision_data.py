"""Images from archives, folders and data sets of every kind, and what is refused."""

import io
import lzma
import os
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tasks.cli.errors import DataError
from tasks.vision.data import cifar, image_set, load_images, sources
from tasks.vision.data.decode import decode_file, to_tensor
from tasks.vision.data.drawn import CLASSES, draw_images
from tasks.vision.data.image_set import stratified

DATA = os.environ.get("SEQBA_DATA")
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


# ---- decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_images_of_every_kind_become_red_green_and_blue_bytes(mode, tmp_path):
    if mode == "I;16":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
        want = np.repeat(PIXELS[..., :1], 3, 2)
    else:
        image = Image.fromarray(PIXELS).convert(mode)
        want = np.asarray(image.convert("RGB"))
    assert torch.equal(to_tensor(image), torch.from_numpy(np.array(want)).permute(2, 0, 1))
    if mode in ("RGB", "L", "1", "P", "RGBA", "LA", "I;16"):
        image.save(tmp_path / "x.png")
        assert torch.equal(decode_file(tmp_path / "x.png"), to_tensor(image))


def test_what_is_transparent_is_white_also_in_a_palette():
    clear = Image.fromarray(np.dstack([PIXELS, np.full((5, 7), 0, np.uint8)]))
    assert (to_tensor(clear) == 255).all()
    half = Image.fromarray(np.dstack([np.zeros_like(PIXELS), np.full((5, 7), 128, np.uint8)]))
    assert 120 < int(to_tensor(half).float().mean()) < 135
    palette = Image.fromarray(PIXELS).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_tensor(palette)[:, 0, 0].tolist() == [255] * 3


def test_a_photograph_is_turned_as_its_camera_says():
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    want = torch.from_numpy(np.rot90(PIXELS, -1).copy()).permute(2, 0, 1)
    assert torch.equal(to_tensor(image), want)


def test_one_pixel_is_an_image_and_floating_point_and_damaged_files_are_refused(tmp_path):
    assert to_tensor(Image.fromarray(PIXELS[:1, :1])).shape == (3, 1, 1)
    with pytest.raises(ValueError, match="floating-point numbers"):
        to_tensor(Image.fromarray(PIXELS[..., 0].astype(np.float32)))
    for content in (b"", b"no image", Path(__file__).read_bytes()):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.png cannot be decoded"):
            decode_file(tmp_path / "x.png")
    Image.fromarray(PIXELS).resize((200, 200)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be decoded: .*truncated"):
        decode_file(tmp_path / "cut.jpg")


# ---- drawn images and what is held out


def test_drawn_images_are_a_function_of_their_seed_and_of_all_classes():
    images = draw_images(40, 0)
    assert torch.equal(images.tensor, draw_images(40, 0).tensor)
    assert not torch.equal(images.tensor, draw_images(40, 1).tensor)
    assert images.tensor.shape == (40, 3, 32, 32)
    assert torch.bincount(images.labels).tolist() == [4] * len(CLASSES)
    assert len(images.tensor.flatten(1).unique(dim=0)) == 40


@pytest.mark.parametrize("count", [1, 7, 30, 59])
def test_what_is_held_out_has_each_class_by_its_share_and_is_no_longer_in_the_rest(count):
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)[torch.randperm(60)]
    some, rest = stratified(labels, count, seed=1)
    assert sorted([*some.tolist(), *rest.tolist()]) == list(range(60))
    got = torch.bincount(labels[some], minlength=3).double()
    assert (got - torch.tensor([30, 20, 10]) * count / 60).abs().max() <= 1
    assert not torch.equal(some, stratified(labels, count, seed=2)[0])


def test_the_splits_of_drawn_images_follow_the_seed_and_share_no_image(monkeypatch):
    monkeypatch.setattr(sources, "_DRAWN", {"train": 30, "valid": 20, "test": 20})
    images = load_images(None, seed=1)
    pixels = torch.cat([images.train.tensor, images.valid.tensor, images.test.tensor])
    assert len(pixels.flatten(1).unique(dim=0)) == 70
    assert torch.equal(pixels, draw_images(70, 1).tensor)
    assert not torch.equal(load_images(None, seed=2).train.tensor, images.train.tensor)
    fewer = load_images(None, seed=1, train_images=20)
    assert torch.bincount(fewer.train.labels).tolist() == [2] * 10


@pytest.mark.parametrize("part", ["train", "valid"])
def test_the_fingerprint_names_the_pixels_and_the_labels_of_training_and_validation(part, monkeypatch):
    monkeypatch.setattr(sources, "_DRAWN", {"train": 30, "valid": 20, "test": 20})
    images = load_images(None)
    before = images.fingerprint
    split = getattr(images, part)
    split.tensor[3, 0, 4, 5] += 1
    changed = images.fingerprint
    split.labels[2] = (split.labels[2] + 1) % 10
    assert len({before, changed, images.fingerprint}) == 3


def test_a_class_without_an_image_to_train_on_is_named(monkeypatch):
    monkeypatch.setattr(sources, "_DRAWN", {"train": 30, "valid": 20, "test": 20})
    with pytest.raises(DataError, match=r"5 classes have no image to train on, '.*' for one"):
        load_images(None, train_images=5)


# ---- CIFAR


def write_cifar(folder, monkeypatch, *, packed=(), fine=False):
    """A small archive of the published layout; the md5 of its files is taken for the published one."""
    archive = cifar.ARCHIVES[int(fine)]
    folder, num_classes = folder / archive.folder, 100 if fine else 10
    folder.mkdir()
    generator, md5 = np.random.default_rng(0), {}
    for name in (*archive.train, *archive.test, archive.meta):
        content = {archive.names: [f"class {i}" for i in range(num_classes)]}
        if name != archive.meta:
            data = generator.integers(0, 256, (2 * num_classes, 3_072), dtype=np.uint8)
            content = {"data": data, archive.labels: [int(i) % num_classes for i in range(len(data))]}
        data = pickle.dumps(content, protocol=2)
        file = folder / (f"{name}.xz" if name in packed else name)
        file.write_bytes(lzma.compress(data) if name in packed else data)
        md5[name] = __import__("hashlib").md5(data).hexdigest()
    known = replace(
        archive,
        train={name: md5[name] for name in archive.train},
        test={name: md5[name] for name in archive.test},
        meta_md5=md5[archive.meta],
    )
    monkeypatch.setattr(cifar, "ARCHIVES", (known,))
    return folder


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("packed", [(), ("data_batch_2", "test_batch", "train")])
def test_an_archive_is_read_packed_or_plain_from_its_folder_or_the_one_above(fine, packed, tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, monkeypatch, packed=packed, fine=fine)
    for place in (folder, tmp_path):
        images = load_images(str(place), valid_images=5)
        sizes = (195, 5, 200) if fine else (95, 5, 20)
        assert (len(images.train), len(images.valid), len(images.test)) == sizes
        assert images.classes[3] == "class 3"
        member = folder / next(iter(cifar.ARCHIVES[0].test))
        raw = member.read_bytes() if member.exists() else lzma.decompress(Path(f"{member}.xz").read_bytes())
        content = pickle.loads(raw)
        assert torch.equal(images.test.tensor.flatten(1), torch.from_numpy(content["data"]))
        assert images.test.labels.tolist() == content[cifar.ARCHIVES[0].labels]


class Danger:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_would_run_something_or_is_not_what_was_published_is_refused(tmp_path, monkeypatch, capsys):
    folder = write_cifar(tmp_path, monkeypatch)
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Danger()}))
    with pytest.raises(
        DataError, match=r"data_batch_3 is no file of CIFAR, or damaged: it wants to load builtins\.print"
    ):
        load_images(str(folder), valid_images=5)
    assert "this ran" not in capsys.readouterr().out
    (folder / "data_batch_3").write_bytes(whole[:-500])
    with pytest.raises(DataError, match="data_batch_3 is no file of CIFAR, or damaged"):
        load_images(str(folder), valid_images=5)
    (folder / "data_batch_3").write_bytes((folder / "data_batch_4").read_bytes())
    with pytest.raises(
        DataError, match=r"data_batch_3 is not the published file: its md5 is \w+, not \w+; get it anew"
    ):
        load_images(str(folder), valid_images=5)
    names = (folder / "batches.meta").read_bytes()
    (folder / "data_batch_3").write_bytes(whole)
    (folder / "batches.meta").write_bytes(names.replace(b"class 1", b"class 7"))
    with pytest.raises(DataError, match=r"batches\.meta is not the published file"):
        load_images(str(folder), valid_images=5)
    (folder / "batches.meta").write_bytes(names)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"has no data_batch_3 \(nor data_batch_3\.xz\)"):
        load_images(str(folder), valid_images=5)


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="SEQBA_DATA names no folder with CIFAR-10")
def test_the_real_archive_is_the_published_one():
    images = load_images(str(Path(DATA, "cifar10")))
    assert (len(images.train), len(images.valid), len(images.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(images.valid.labels).tolist() == [500] * 10
    mean = torch.cat([images.train.tensor, images.valid.tensor]).double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.49139968, 0.48215841, 0.44653091]).double(), atol=1e-6, rtol=0)


# ---- folders


def write_folder(folder, splits=("train", "test"), classes=("cat", "dog"), count=6):
    generator = np.random.default_rng(1)
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (8, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.{'JPEG' if i % 2 else 'png'}")
    return folder


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        (("train", "val", "test"), (12, 12, 12)),
        (("train", "valid"), (10, 2, 12)),
        (("train",), (8, 2, 2)),
        (("",), (8, 2, 2)),
    ],
)
def test_class_folders_are_read_with_any_of_the_usual_splits(splits, sizes, tmp_path):
    images = load_images(str(write_folder(tmp_path, splits)), valid_images=2)
    assert (len(images.train), len(images.valid), len(images.test)) == sizes
    assert images.classes == ["cat", "dog"]
    sample = images.train[0]
    assert sample["image"].shape == (3, 8, 9)
    assert sample["label"] == 0
    assert images.train.tensor is None
    assert load_images(str(tmp_path), valid_images=2).fingerprint == images.fingerprint


def test_hidden_files_are_passed_over_and_others_counted(tmp_path, caplog):
    folder = write_folder(tmp_path)
    (folder / "train" / "cat" / ".DS_Store").write_text("x")
    (folder / "train" / ".git").mkdir()
    for name in ("notes.txt", "notes.pdf"):
        (folder / "train" / "cat" / name).write_text("x")
    with caplog.at_level("INFO", "tasks"):
        images = load_images(str(folder), valid_images=2)
    assert len(images.train) == 10
    assert "2 files are no images by their names, and left out: notes.pdf, notes.txt" in caplog.text
    assert ".DS_Store" not in caplog.text


def test_a_corrupt_image_ends_the_run_that_meets_it_or_is_left_out_and_named(tmp_path, caplog):
    folder = write_folder(tmp_path)
    bad = folder / "train" / "dog" / "3.JPEG"
    bad.write_bytes(bad.read_bytes()[:40])
    images = load_images(str(folder), valid_images=2)
    with pytest.raises(DataError, match=r"dog/3\.JPEG cannot be decoded"):
        [part[i] for part in (images.train, images.valid) for i in range(len(part))]
    with caplog.at_level("INFO", "tasks"):
        images = load_images(str(folder), valid_images=2, skip_corrupt=True)
    assert len(images.train) + len(images.valid) == 11
    assert "1 images are left out" in caplog.text
    assert "3.JPEG" in caplog.text


def test_folders_that_cannot_be_trained_on_are_refused(tmp_path):
    folder = write_folder(tmp_path / "a")
    (folder / "test" / "fox").mkdir()
    with pytest.raises(DataError, match=r"test has the class 'fox', which the training images do not have"):
        load_images(str(folder), valid_images=2)
    (folder / "test" / "fox").rmdir()
    (folder / "train" / "ape").mkdir()
    with pytest.raises(DataError, match=r"train/ape has no image"):
        load_images(str(folder), valid_images=2)
    (folder / "train" / "ape").rmdir()
    (folder / "test" / "cat").rename(folder / "test" / ".cat")
    with pytest.raises(DataError, match=r"test has no folder 'cat', a class of the training images"):
        load_images(str(folder), valid_images=2)
    with pytest.raises(DataError, match="neither train/CLASS"):
        load_images(str(tmp_path / "a" / "train" / "cat"), valid_images=2)
    with pytest.raises(DataError, match="12 training images, of which --valid-images 12 cannot be held out"):
        load_images(str(write_folder(tmp_path / "b")), valid_images=12)
    with pytest.raises(DataError, match="--train-images 11 is more than the 10 images to train on"):
        load_images(str(tmp_path / "b"), valid_images=2, train_images=11)
    with pytest.raises(DataError, match="cannot load"):
        load_images(str(tmp_path / "nothing"))


def test_an_image_keeps_its_class_and_its_pixels_through_every_cut(tmp_path):
    for label, name in enumerate(("cat", "dog", "fox")):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (4, 3), (label, i, 7)).save(tmp_path / name / f"{i}.png")
    images = load_images(str(tmp_path), valid_images=6, train_images=9)
    met = []
    for part in (images.train, images.valid, images.test):
        for i in range(len(part)):
            sample = part[i]
            label, number, _ = sample["image"][:, 1, 2].tolist()
            assert sample["label"] == label == int(part.labels[i])
            met.append((label, number))
    assert len(set(met)) == len(met) == 9 + 6 + 6
    options = {"valid_images": 6, "train_images": 9}
    held = load_images(str(tmp_path), in_memory=True, **options)
    assert torch.equal(held.train.tensor, torch.stack([images.train[i]["image"] for i in range(9)]))
    Image.new("RGB", (4, 3)).save(images.train.items[0])  # as one does with a damaged file
    assert load_images(str(tmp_path), **options).fingerprint == images.fingerprint
    assert load_images(str(tmp_path), in_memory=True, **options).fingerprint != held.fingerprint
    images.train.items[0].unlink()
    assert load_images(str(tmp_path), **options).fingerprint != images.fingerprint


def folder_of(path, sizes):
    for split, name in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        (path / split / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.new("RGB", size, (i, 0, 0)).save(path / split / name / f"{i}.png")
    return str(path)


def test_images_of_several_sizes_are_refused_where_they_are_to_be_of_one(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "mixed", [(8, 8), (8, 8), (9, 8)])
    with pytest.raises(DataError, match="images are of several sizes, 8 x 8 and 8 x 9 for two; give --image-size"):
        load_images(folder, valid_images=2, in_memory=True)
    one = folder_of(tmp_path / "one", [(8, 8)] * 3)
    monkeypatch.setattr(image_set, "_LARGEST", 3 * 64 * 4 - 1)
    with pytest.raises(DataError, match="4 training images of 8 x 8 are too many to be kept decoded"):
        load_images(one, valid_images=2, in_memory=True)


def test_damaged_images_are_counted_before_training_with_the_remedy(tmp_path):
    folder = folder_of(tmp_path / "data", [(8, 8)] * 3)
    for name in ("cat", "dog"):
        (tmp_path / "data" / "test" / name / "1.png").write_bytes(b"no image")
    images = load_images(folder, valid_images=2)
    for num_workers in (0, 1):
        with pytest.raises(DataError, match=r"2 of the test images cannot be decoded: .*1\.png.*--on-corrupt skip"):
            images.test.refuse_damaged("test", num_workers)
    images.valid.refuse_damaged("validation")
    with pytest.raises(DataError, match=r"cannot be decoded: .*; replace it and go on with --resume"):
        images.test[1]


def test_an_archive_that_is_not_unpacked_and_two_in_a_folder_are_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="is a file; unpack it, and give the folder"):
        load_images(str(tmp_path / "cifar-10-python.tar.gz"))
    for folder, member in (("cifar-10-batches-py", "data_batch_1"), ("cifar-100-python", "train")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / member).write_bytes(b"")
    with pytest.raises(DataError, match=r"holds two archives; give one of .*cifar-10-.* and .*cifar-100-python"):
        load_images(str(tmp_path))


def test_numbers_of_any_width_are_classes_and_a_row_without_an_image_is_damaged(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue(), "path": None}] * 5 + [None]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("uint8")})
    saved = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1, 0, 1]}, features=kinds)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "saved"))
    images = load_images(str(tmp_path / "saved"), valid_images=1)
    with pytest.raises(DataError, match="1 of the test images cannot be decoded: row 5 of the split test has no image"):
        images.test.refuse_damaged("test")
    assert len(load_images(str(tmp_path / "saved"), valid_images=1, skip_corrupt=True).test) == 5


# ---- data sets


def test_a_saved_data_set_with_images_and_classes_is_read(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [Image.fromarray(PIXELS)] * 6, "label": [0, 1] * 3}
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)})
    made["test"] = datasets.Dataset.from_dict({name: x[:2] for name, x in rows.items()}, features)
    made.save_to_disk(str(tmp_path / "saved"))
    images = load_images(str(tmp_path / "saved"), valid_images=2)
    assert (len(images.train), len(images.valid), len(images.test)) == (4, 2, 2)
    assert list(images.classes) == ["cat", "dog"]
    assert torch.equal(images.test[1]["image"], torch.from_numpy(PIXELS).permute(2, 0, 1))
    assert images.test[1]["label"] == 1
    plain = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [1, 2]})})
    plain.save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(DataError, match=r"has the columns x; it needs one of images and one of classes"):
        load_images(str(tmp_path / "plain"))


def save_splits(path, columns, kinds):
    """A data set with the same features in every split; `columns`: split -> rows."""
    features = datasets.Features(kinds)
    made = {split: datasets.Dataset.from_dict(rows, features) for split, rows in columns.items()}
    datasets.DatasetDict(made).save_to_disk(str(path))
    return str(path)


IMAGES = [Image.fromarray(PIXELS)] * 6


@pytest.mark.parametrize(
    ("kind", "labels", "classes"),
    [
        (datasets.Value("int64"), [3, 10, 3, 10, 7, 7], ["3", "7", "10"]),
        (datasets.Value("string"), ["b", "a", "b", "a", "c", "c"], ["a", "b", "c"]),
    ],
)
def test_classes_may_be_numbers_or_names(kind, labels, classes, tmp_path):
    columns = {"train": {"image": IMAGES, "label": labels}, "test": {"image": IMAGES[:2], "label": labels[:2]}}
    images = load_images(
        save_splits(tmp_path / "a", columns, {"image": datasets.Image(), "label": kind}), valid_images=1
    )
    assert list(images.classes) == classes
    assert [classes[label] for label in images.test.labels] == [str(label) for label in labels[:2]]
    columns["test"]["label"] = [labels[0], 99 if kind.dtype == "int64" else "z"]
    wrong = save_splits(tmp_path / "b", columns, {"image": datasets.Image(), "label": kind})
    with pytest.raises(
        DataError, match=r"row 1 of the split test has the label ('z'|99), which is none of the 3 classes"
    ):
        load_images(wrong, valid_images=1)


def test_a_split_with_hidden_labels_is_left_out_and_said(tmp_path, caplog):
    columns = {
        "train": {"image": IMAGES, "label": [0, 1] * 3},
        "validation": {"image": IMAGES[:3], "label": [0, 1, 1]},
        "test": {"image": IMAGES, "label": [-1] * 6},
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    with caplog.at_level("INFO", "tasks"):
        images = load_images(save_splits(tmp_path / "a", columns, kinds), valid_images=2)
    assert (len(images.train), len(images.valid), len(images.test)) == (4, 2, 3)
    assert "the labels of the split test are hidden, and it is left out" in caplog.text
    assert "there is no test split: the validation split takes its place" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_of_a_data_set_is_named_by_its_row_or_left_out(num_workers, tmp_path, caplog):
    good = io.BytesIO()
    IMAGES[0].save(good, "PNG")
    rows = [{"bytes": good.getvalue(), "path": None}] * 5 + [{"bytes": b"no image", "path": None}]
    columns = {split: {"image": rows, "label": [0, 1] * 3} for split in ("train", "test")}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    data = save_splits(tmp_path / "a", columns, kinds)
    images = load_images(data, valid_images=2)
    loader = DataLoader(images.test, batch_size=None, num_workers=num_workers)
    with pytest.raises(
        DataError, match=r"^row 5 of the split test cannot be decoded: cannot identify image file[^:]*$"
    ):
        list(loader)
    with caplog.at_level("INFO", "tasks"):
        images = load_images(data, valid_images=2, skip_corrupt=True)
    assert (len(images.train) + len(images.valid), len(images.test)) == (5, 5)
    assert caplog.text.count("1 images are left out: row 5 of the split") == 2


def test_images_of_a_class_that_are_all_corrupt_are_refused(tmp_path):
    folder = write_folder(tmp_path, count=2)
    for path in (folder / "test" / "dog").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"test/dog has no image that can be decoded"):
        load_images(str(folder), valid_images=2, skip_corrupt=True)


def test_a_second_folder_of_a_split_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", "tasks"):
        load_images(str(write_folder(tmp_path, ("train", "val", "valid", "test"))))
    assert "valid are the valid images, and val is left out" in caplog.text


def test_grey_of_32_bits_is_refused_and_of_16_bits_read():
    wide = Image.fromarray(np.array([[0, 65_535]], dtype=np.int32))
    assert to_tensor(wide)[0].tolist() == [[0, 255]]
    dark = Image.fromarray(np.full((2, 2), 200, np.int32))
    with pytest.raises(
        ValueError, match="its pixels are numbers of more than 8 bits, 200 to 200; convert it to 8 bits"
    ):
        to_tensor(dark)
    with pytest.raises(ValueError, match="its pixels are numbers of more than 8 bits, 0 to 65536"):
        to_tensor(Image.fromarray(np.array([[0, 65_536]], dtype=np.int32)))


def test_16_bit_images_of_small_numbers_would_be_black_and_are_refused(tmp_path):
    Image.fromarray(np.arange(254, dtype=np.uint16).reshape(2, 127)).save(tmp_path / "dark.png")
    with Image.open(tmp_path / "dark.png") as image, pytest.raises(ValueError, match="more than 8 bits, 0 to 253"):
        to_tensor(image)


@pytest.mark.parametrize("names", [("Train", "test"), ("training", "testing"), ("a", "val")])
def test_folders_named_like_splits_are_no_classes(names, tmp_path):
    for name in names:
        (tmp_path / name / "c").mkdir(parents=True)
        Image.fromarray(PIXELS).save(tmp_path / name / "c" / "0.png")
        Image.fromarray(PIXELS).save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="would be taken for classes; call the folder of the training images train"):
        load_images(str(tmp_path), seed=0)
