"""A run of scripts/train_vision.py: its laws, its resume, its workers and ranks, and what it leaves behind."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from torchvision.ops import StochasticDepth

from distributed import run_ranks
from seqba import BatchAugmentationArguments, unfold
from seqba.audit import audit_masks
from tasks.cli.errors import DataError, UserError
from tasks.cli.machine import MachineOptions
from tasks.run.log import read_metrics
from tasks.run.options import RunOptions
from tasks.run.stream import SampleKey
from tasks.vision import load_classifier
from tasks.vision import train as vision
from tasks.vision.augment import Views
from tasks.vision.config import VisionConfig, may_differ, parse_config, run_folder
from tasks.vision.data import folders, load_images, sources
from tasks.vision.evaluate import evaluate
from tasks.vision.loss import VisionLoss
from tasks.vision.model_folder import Classifier, save_classifier
from tasks.vision.networks import build_model
from tasks.vision.networks.amoebanet import amoebanet
from tasks.vision.networks.cells import set_drop_path
from tasks.vision.networks.manifold_mixup import mixing_layer, mixing_layers
from tasks.vision.pipelines import DevicePipeline, WorkerPipeline
from tasks.vision.presets import PRESETS

TINY = parse_config([]).changed(
    network="resnet8", batch_size=6, learning_rate=0.05, cutout_size=8, ba_m=2, epochs=None,
    max_updates=9, log_every=1, eval_every=3, save_every=4, eval_batch_size=20, cpu=True,
)  # fmt: skip
DRAWN = {"train": 40, "valid": 30, "test": 30}  # an epoch of TINY has 6 updates
STILL = {"crop_padding": 0, "flip": False, "cutout": False}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(sources, "_DRAWN", DRAWN)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(folder, **changes):
    vision.train(TINY.changed(output_dir=str(folder), **changes))
    return folder


def checkpoint(folder, update=9):
    return Path(folder) / "checkpoints" / f"update-{update:06d}"


def weights(folder, update=9):
    return load_file(checkpoint(folder, update) / "model.safetensors")


def rows(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(Path(folder) / "metrics.jsonl")]


def assert_same_weights(one, other, update=9, but=(), **tolerance):
    there = weights(other, update)
    for name, weight in weights(one, update).items():
        if not any(part in name for part in but):
            torch.testing.assert_close(there[name], weight, msg=name, **tolerance)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_DRAWN", DRAWN)
        folder = run(tmp_path_factory.mktemp("finished") / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


# ---- the run


def test_a_run_leaves_a_complete_folder_whose_model_scores_what_it_says(finished):
    assert {path.name for path in finished.glob("[!.]*")} == {
        "config.json", "metrics.jsonl", "results.json", "checkpoints", "model", "curve.png", "transforms.png"
    }  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    logged = rows(finished)
    scored = {row["update"]: row["valid_accuracy"] for row in logged if "valid_accuracy" in row}
    assert list(scored) == [3, 6, 9]
    assert scored[results["best_update"]] == max(scored.values())
    classifier = load_classifier(str(finished / "model"))
    images = load_images(None)
    correct, nats = 0, 0.0
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (classifier.views.mean, classifier.views.std))
    for i in range(len(images.test)):
        sample = images.test[i]
        logits = classifier.model((sample["image"][None] / 255 - mean) / std)[0].detach()
        nats += float(F.cross_entropy(logits, torch.tensor(sample["label"])))
        correct += int(logits.argmax()) == sample["label"]
        picture = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
        assert classifier.classify(picture) == images.classes[int(logits.argmax())]
    assert results["test_accuracy"] == pytest.approx(correct / 30)
    assert results["test_loss"] == pytest.approx(nats / 30, rel=1e-4)
    card = (finished / "model" / "README.md").read_text()
    for part in (f"top-1 accuracy {correct / 30:.2%}", "M | 2 (copies", "crop with 4 pixels", "load_classifier"):
        assert part in card, part
    modes = [file.stat().st_mode for file in (finished / "model" / "model.safetensors", finished / "results.json")]
    assert modes[0] == modes[1]
    with Image.open(finished / "transforms.png") as sheet:
        assert sheet.size == (3 * 98 + 2, 4 * 98 + 2)  # four images, each as it is and twice transformed


@pytest.mark.trap(20)
@pytest.mark.trap(21)
def test_data_rates_and_cadence_do_not_move_with_m(tmp_path):
    seen = {}
    for m in (1, 3):
        folder = run(tmp_path / str(m), ba_m=m)
        seen[m] = rows(folder)
    for a, b in zip(seen[1], seen[3], strict=True):
        assert (a["update"], a["lr"], a["unique_samples"]) == (b["update"], b["lr"], b["unique_samples"])
        assert b["seen_instances"] == b["target_labels"] == 3 * a["target_labels"] == 3 * b["unique_samples"]
        assert ("valid_accuracy" in a) == ("valid_accuracy" in b)


@pytest.mark.trap(12)
@pytest.mark.trap(16)
@pytest.mark.parametrize(("plan", "manifold"), [(1, False), (2, True)])
@pytest.mark.parametrize("pipeline", ["device", "workers"])
def test_no_plan_changes_a_run_whose_batch_norm_knows_the_copies(plan, manifold, pipeline, tmp_path):
    options = {
        "ba_m": 3,
        "pipeline": pipeline,
        "mixup_alpha": 0.3,
        "manifold_mixup": manifold,
        "max_updates": 2,
        "save_every": 2,
        "ghost_batch_size": 0,
    }
    fused = run(tmp_path / "fused", **options)
    apart = run(tmp_path / "apart", copies_per_pass=plan, **options)
    assert_same_weights(fused, apart, update=2, rtol=1e-3, atol=1e-4)


@pytest.mark.trap(26)
def test_no_plan_changes_a_run_whose_network_draws_when_its_copies_have_streams(tmp_path, monkeypatch):
    def dropping(name, num_classes):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(3_072, 16), torch.nn.Dropout(), torch.nn.Linear(16, num_classes)
        )

    monkeypatch.setattr(vision, "build_model", dropping)
    options = {"ba_m": 3, "max_updates": 2, "save_every": 2}
    fused = run(tmp_path / "fused", reproducible_copies=True, **options)
    apart = run(tmp_path / "apart", reproducible_copies=True, copies_per_pass=2, **options)
    assert_same_weights(fused, apart, update=2, rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_same_weights(fused, run(tmp_path / "others", **options), update=2, rtol=1e-3, atol=1e-4)


def test_the_result_is_the_checkpoint_with_the_highest_accuracy(tmp_path, monkeypatch):
    falling = iter([0.5, 0.9, 0.1])
    whole = evaluate

    def scored(*args, **kwargs):
        scores = whole(*args, **kwargs)
        return scores | ({"valid_accuracy": next(falling)} if "valid_accuracy" in scores else {})

    monkeypatch.setattr(vision, "evaluate", scored)
    folder = run(tmp_path / "run")
    assert json.loads((folder / "results.json").read_text())["best_update"] == 6
    best, delivered = weights(folder, 6), load_file(folder / "model" / "model.safetensors")
    for name, weight in delivered.items():
        assert torch.equal(best[f"{name}"], weight), name


def test_without_t_copies_are_samples_again_and_a_run_does_not_depend_on_m(tmp_path):
    options = STILL | {"max_updates": 2, "save_every": 2, "ghost_batch_size": 0}
    one = run(tmp_path / "one", ba_m=1, **options)
    four = run(tmp_path / "four", ba_m=4, allow_identical_copies=True, **options)
    moves_once_a_block = ("running", "tracked")
    assert_same_weights(one, four, update=2, but=moves_once_a_block, rtol=1e-3, atol=1e-4)


@pytest.mark.trap(28)
@pytest.mark.trap(29)
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # three on two cores
def test_workers_change_no_bit(num_workers, tmp_path):
    here = run(tmp_path / "here", pipeline="workers")
    there = run(tmp_path / "there", pipeline="workers", num_workers=num_workers)
    assert rows(here) == rows(there)
    assert_same_weights(here, there, rtol=0, atol=0)


class Killed(BaseException):
    """Ends a run as a kill does: nothing of the program gets to act on it."""


@pytest.mark.trap(24)
@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": "device"},
        {"pipeline": "workers", "auto_augment": "trivialaugment", "mixup_alpha": 0.2},
        {"mixup_alpha": 0.5, "manifold_mixup": True},
        {"pipeline": "workers", "num_workers": 2, "accumulation": 2},
        {
            "network": "torchvision/squeezenet1_1",
            "reproducible_copies": True,
            "copies_per_pass": 1,
            "ghost_batch_size": None,
        },
    ],
)
def test_a_killed_run_resumed_is_bitwise_the_undisturbed_one(changes, tmp_path):
    straight = run(tmp_path / "straight", **changes)
    whole = vision.TrainStep.__call__

    def call(self, batches, *, update):
        if update == 7:
            raise Killed
        return whole(self, batches, update=update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision.TrainStep, "__call__", call)
        with pytest.raises(Killed):
            run(tmp_path / "killed", **changes)
    resumed = run(tmp_path / "killed", resume=True, **changes)
    assert rows(straight) == rows(resumed)
    assert_same_weights(straight, resumed, rtol=0, atol=0)


@pytest.mark.slow
def test_every_option_of_training_reaches_it(tmp_path):
    changes = [
        {}, {"network": "resnet14"}, {"ghost_batch_size": 3}, {"image_size": 40}, {"crop_padding": 2}, {"flip": False},
        {"crop_padding": 0, "random_resized_crop": True, "image_size": 32}, {"auto_augment": "randaugment"},
        {"cutout": False}, {"cutout_size": 4}, {"mixup_alpha": 0.2}, {"mixup_alpha": 0.2, "manifold_mixup": True},
        {"batch_size": 5}, {"learning_rate": 0.1},
        {"lr_power": 0.5}, {"warmup_epochs": 1.0}, {"momentum": 0.5}, {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decay_bias_and_norm": True}, {"label_smoothing": 0.1}, {"ba_m": 3}, {"seed": 1},
        {"train_images": 30}, {"corpus_seed": 1}, {"accumulation": 2}, {"max_norm": 0.01}, {"lr_drops": [0.1]},
    ]  # fmt: skip
    found = {}
    for i, change in enumerate(changes):
        folder = run(tmp_path / str(i), **{"max_updates": 2, "eval_every": 2} | change)
        found[(checkpoint(folder, 2) / "model.safetensors").read_bytes()] = change
    assert len(found) == len(changes), [change for change in changes if change not in found.values()]


@pytest.mark.trap(23)
def test_an_epoch_has_each_image_once_at_most_and_ends_with_whole_batches(tmp_path, monkeypatch):
    met = []
    whole = vision.TrainStep.__call__

    def call(self, batches, *, update):
        met.extend(batch["keys"][:, 2].tolist() for batch in batches)
        return whole(self, batches, update=update)

    monkeypatch.setattr(vision.TrainStep, "__call__", call)
    run(tmp_path / "run", epochs=2.0, max_updates=1_000, eval_every=100, **{"accumulation": 2})
    assert [len(batch) for batch in met] == [6] * 12  # 3 updates of 2 batches in each of 2 epochs
    for epoch in (met[:6], met[6:]):
        assert len({number for batch in epoch for number in batch}) == 36
    assert met[:6] != met[6:]


@pytest.mark.trap(22)
@pytest.mark.parametrize("pipeline", ["device", "workers"])
def test_an_update_trains_on_each_of_its_images_m_times(pipeline, tmp_path, monkeypatch):
    passes = []
    whole = VisionLoss.forward

    def forward(self, batch):
        if self.training:
            passes.append(batch["images"].flatten(1))
        return whole(self, batch)

    monkeypatch.setattr(VisionLoss, "forward", forward)
    options = {"ba_m": 3, "copies_per_pass": 2, "max_updates": 7, "allow_identical_copies": True}  # into epoch 2
    run(tmp_path / "run", pipeline=pipeline, **options, **STILL)
    assert [len(rows) for rows in passes] == [4, *[12, 6] * 7]  # after the rehearsal
    passes = passes[1:]
    for update in zip(passes[::2], passes[1::2], strict=True):
        copies = unfold(torch.cat(update), 3)
        assert (copies == copies[0]).all()
        assert len(copies[0].unique(dim=0)) == 6


@pytest.fixture
def compiler():
    yield
    torch.compiler.reset()


@pytest.mark.trap(26)
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_masks_of_a_network_keep_their_rate_and_differ_between_copies_compiled_or_not(is_compiled, monkeypatch):
    shown = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.3))
    monkeypatch.setattr(vision, "build_model", lambda name, num_classes: shown)
    Accelerator(cpu=True)  # whose rank seeds the masks
    model = vision.build(dataclasses.replace(TINY.config, compile=is_compiled), 10, 0).train()
    kept = torch.cat([model(torch.ones(8, 3, 64, 64)) != 0 for _ in range(2)]).double()  # eight copies of one image
    z = (kept.mean() - 0.7) / (0.7 * 0.3 / kept.numel()) ** 0.5
    assert abs(z) < 5
    assert (torch.corrcoef(kept) - torch.eye(16)).abs().max() < 5 / kept.shape[1] ** 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("changes", [{"compile": True}, {"channels_last": True}])
def test_a_compiled_or_channels_last_run_is_the_same_run(changes, tmp_path):
    plain = run(tmp_path / "plain", max_updates=2, save_every=2)
    other = run(tmp_path / "other", max_updates=2, save_every=2, **changes)
    assert_same_weights(plain, other, update=2, rtol=1e-3, atol=1e-4)
    assert load_classifier(str(other / "model")).model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# ---- T


def pipelines(**changes):
    options = TINY.changed(**changes)
    images = load_images(None)
    views = Views.of(options.config, images)
    copies = tuple(range(options.copies.ba_m))
    made = vision.make_pipeline(options, Accelerator(cpu=True), images, views, copies)
    return made, images, views


@pytest.mark.trap(29)
@pytest.mark.parametrize("pipeline", ["device", "workers"])
def test_copies_samples_and_epochs_have_transforms_of_their_own(pipeline):
    made, _, _ = pipelines(pipeline=pipeline, ba_m=6)
    made.images.tensor[:] = made.images.tensor[:1].clone()  # one image under many transforms
    seen = [made.transformed(made.first(10, epoch), tuple(range(6))) for epoch in range(3)]
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) > 0.95 * 180
    again = made.transformed(made.first(10, 1), tuple(range(6)))
    assert torch.equal(again, seen[1])


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment"])
def test_a_policy_alone_parts_the_copies(policy):
    made, _, _ = pipelines(auto_augment=policy, ba_m=4, **STILL)
    copies = unfold(made.transformed(made.first(6, 0), (0, 1, 2, 3)), 4)
    assert not torch.equal(copies[0], copies[1])


@pytest.mark.trap(30)
def test_each_batch_epoch_and_copy_is_mixed_in_proportions_of_its_own():
    made, _, _ = pipelines(mixup_alpha=0.5, ba_m=3)
    keys = [[SampleKey(0, epoch, first + n) for n in range(4)] for epoch in (0, 1) for first in (0, 4)]
    batches = [made.collate([made.load(made.dataset[key.sample], key) for key in of_batch]) for of_batch in keys]
    shares = torch.cat([made.take_copies(batch, (0, 1, 2))["proportions"] for batch in batches])
    assert len(shares.unique()) == 4 * 3
    assert torch.equal(made.take_copies(batches[1], (2,))["proportions"], shares[20:24])


def test_t_on_the_device_and_in_workers_differ_in_draws_alone():
    """Crop, flip and Cutout off: what is left is the normalised image, in the rows of the copies."""
    for pipeline, kind in (("device", DevicePipeline), ("workers", WorkerPipeline)):
        made, images, views = pipelines(pipeline=pipeline, ba_m=3, **STILL)
        assert type(made) is kind
        batch = made.take_copies(made.first(4, 0), (0, 2))
        want = views.normalize(images.train.tensor[:4]).repeat(2, 1, 1, 1)
        torch.testing.assert_close(batch["images"], want)
        assert batch["labels"].tolist() == images.train.labels[:4].repeat(2).tolist()


@pytest.mark.parametrize("pipeline", ["device", "workers"])
def test_cutout_leaves_the_mean_colour_behind(pipeline):
    made, images, views = pipelines(pipeline=pipeline, ba_m=5, **STILL | {"cutout": True})
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (views.mean, views.std))
    pixels = images.train.tensor.double() / 255
    torch.testing.assert_close(mean.flatten().double(), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(std.flatten().double(), pixels.transpose(0, 1).flatten(1).std(1))
    rows = made.transformed(made.first(4, 0), tuple(range(5)))
    plain = ((pixels[:4] - mean) / std).float().repeat(5, 1, 1, 1)
    cut = (rows == 0).all(1)
    assert (cut.sum((1, 2)) >= 16).all()  # a quarter of the square at least
    torch.testing.assert_close(rows, torch.where(cut[:, None], 0, plain))


@pytest.mark.parametrize("pipeline", ["device", "workers"])
def test_a_loader_may_send_t_to_processes_that_it_does_not_fork(pipeline):
    made, _, _ = pipelines(pipeline=pipeline, auto_augment="none" if pipeline == "device" else "randaugment")
    key = SampleKey(0, 0, 3)
    sent = pickle.loads(pickle.dumps(made.load))
    for here, there in zip(made.load(made.dataset[3], key), sent(made.dataset[3], key), strict=True):
        assert torch.equal(here, there) if isinstance(here, torch.Tensor) else here == there


def test_an_image_is_decoded_once_an_update_however_many_copies_it_has(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(9):
                pixels = torch.randint(256, (40, 30, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.jpg")
    decoded = []
    whole = folders.decode_file
    monkeypatch.setattr(folders, "decode_file", lambda path: decoded.append(path) or whole(path))
    options = {"data": str(tmp_path / "data"), "valid_images": 4, "ba_m": 4, "batch_size": 7, "max_updates": 2}
    shape = {"image_size": 24, "crop_padding": 0, "random_resized_crop": True}
    folder = run(tmp_path / "run", eval_every=2, **options, **shape)
    # training, validation, test; the rehearsal, the look at validation and test before, and the contact sheet
    assert len(decoded) == 2 * 7 + 4 + 18 + 4 + (4 + 18) + 4 * 2
    views = load_classifier(str(folder / "model")).views
    assert (views.size, views.resized) == (24, 27)
    with pytest.raises(UserError, match="--pipeline device is not possible: --image-size resizes images"):
        run(tmp_path / "no", pipeline="device", **options, **shape)


@pytest.mark.trap(30)
def test_the_loss_of_mixed_images_is_mixed_by_the_same_shares():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    partners, shares = torch.tensor([1, 0, 4, 2]), torch.tensor([0.3, 0.3, 0.9, 0.9])
    batch = {"images": images, "labels": labels, "partner_labels": partners, "proportions": shares}
    logits = model(images).double()
    soft = F.one_hot(labels, 5) * shares[:, None] + F.one_hot(partners, 5) * (1 - shares)[:, None]
    smooth = 0.9 * soft + 0.1 / 5
    want = -(smooth * logits.log_softmax(1)).sum()
    torch.testing.assert_close(VisionLoss(model, 0.1).train()(batch)[0].double(), want, rtol=1e-5, atol=1e-5)


def test_an_auxiliary_classifier_is_part_of_the_training_loss_alone_and_of_the_folder(tmp_path):
    model = amoebanet(10, width=4, num_cells=3)
    batch = {"images": torch.randn(6, 3, 32, 32), "labels": torch.arange(6)}
    logits, auxiliary = model.train()(batch["images"])
    own, other = (F.cross_entropy(x, batch["labels"], reduction="sum") for x in (logits, auxiliary))
    torch.testing.assert_close(VisionLoss(model).train()(batch)[0], own + 0.4 * other)
    want = F.cross_entropy(model.eval()(batch["images"]), batch["labels"], reduction="sum")
    torch.testing.assert_close(VisionLoss(model).eval()(batch)[0], want)
    darts = build_model("darts", 10)
    views = Views((0.5,) * 3, (0.5,) * 3, 32, None)
    save_classifier(tmp_path, Classifier("darts", darts, list("abcdefghij"), views), made_by={}, scores=[])
    loaded = load_classifier(str(tmp_path)).model
    for name, weight in darts.auxiliary.state_dict().items():
        assert torch.equal(loaded.auxiliary.state_dict()[name], weight), name


def test_drop_path_grows_to_its_end_and_keeps_the_mean_and_parts_the_images(tmp_path, monkeypatch):
    seen, real = [], vision.set_drop_path
    monkeypatch.setattr(vision, "set_drop_path", lambda model, p: (seen.append(p), real(model, p)))
    options = TINY.changed(max_updates=4, epochs=None, drop_path=0.4, lr_decay="cosine", output_dir=str(tmp_path))
    monkeypatch.setattr(vision, "build_model", lambda name, classes: amoebanet(classes, width=4, num_cells=3))
    vision.train(options)
    assert seen == pytest.approx([0.4, 0.1, 0.2, 0.3, 0.4])  # first the whole, for the audit
    rates = [row["lr"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    drop = StochasticDepth(0.4, "row")
    dropped = drop.train()(torch.ones(20_000, 2))
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    model = amoebanet(10, width=4, num_cells=3).train()
    assert not any(module.p for module in model.modules() if isinstance(module, StochasticDepth))
    set_drop_path(model, 0.4)
    audit = audit_masks(model, {"images": torch.randn(4, 3, 32, 32)}, forward=lambda net, rows: net(rows["images"])[0])
    assert audit.copies_differ


@pytest.mark.trap(26)
def test_no_plan_changes_a_run_with_drop_path_when_its_copies_have_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "build_model", lambda name, classes: amoebanet(classes, width=4, num_cells=3))
    options = STILL | {"max_updates": 2, "save_every": 2, "ghost_batch_size": 0, "drop_path": 0.6, "ba_m": 3}
    fused, apart, other = (
        run(tmp_path / name, reproducible_copies=True, **options, **more)
        for name, more in (("fused", {}), ("apart", {"copies_per_pass": 1}), ("other", {"copies_per_pass": 2}))
    )
    assert_same_weights(fused, apart, update=2, rtol=1e-3, atol=1e-4)
    assert_same_weights(fused, other, update=2, rtol=1e-3, atol=1e-4)
    without = run(tmp_path / "without", **options | {"drop_path": 0.0, "allow_identical_copies": True})
    with pytest.raises(AssertionError):
        assert_same_weights(fused, without, update=2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_manifold_mixup_mixes_in_front_of_a_layer_with_another_sample_of_the_same_copy(layer):
    pipeline, _, _ = pipelines(mixup_alpha=0.5, ba_m=3)
    batch = pipeline.first(4, epoch=0) | {"layer": layer}
    rows = pipeline.take_copies(batch, (0, 2))
    partners, shares = rows["partners"], rows["proportions"]
    assert (partners // 4).tolist() == [0] * 4 + [1] * 4
    assert bool((partners != torch.arange(8)).all())
    assert len(set(shares.tolist())) == 2
    plain = pipeline.take_copies(pipeline.first(4, epoch=0), (0, 2))
    assert torch.equal(plain["partner_labels"], rows["partner_labels"])
    assert torch.equal(plain["proportions"], rows["proportions"])
    model = build_model("resnet8", 10).eval()
    part = torch.nn.Sequential(model.conv1, model.bn1, torch.nn.ReLU(), *model.blocks[:layer])
    rest = torch.nn.Sequential(*model.blocks[layer:])
    hidden = part(rows["images"]) if layer else rows["images"]
    share = shares.view(-1, 1, 1, 1)
    mixed = share * hidden + (1 - share) * hidden[partners]
    logits = model.fc(rest(mixed if layer else part(mixed)).mean((2, 3)))
    own, other = (
        F.cross_entropy(logits, labels, reduction="none") for labels in (rows["labels"], rows["labels"][partners])
    )
    want = (shares * own + (1 - shares) * other).sum()
    loss_model = VisionLoss(model, 0.0, mixing_layers(model, "resnet8"))
    torch.testing.assert_close(loss_model(rows)[0], want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(rows["images"]), logits)  # the hook is gone


def test_manifold_mixup_has_one_layer_an_update_each_as_often_and_residual_networks_alone():
    drawn = [mixing_layer(3, update, 3) for update in range(1, 3_001)]
    assert drawn == [mixing_layer(3, update, 3) for update in range(1, 3_001)]
    assert all(900 < drawn.count(layer) < 1_100 for layer in range(3))
    for name in ("resnet8", "wrn10-1", "torchvision/resnet18"):
        assert len(mixing_layers(build_model(name, 10), name)) == 3
    with pytest.raises(UserError, match="--manifold-mixup: vgg16-cifar is no residual network"):
        mixing_layers(build_model("vgg16-cifar", 10), "vgg16-cifar")
    with pytest.raises(UserError, match="--manifold-mixup needs --mixup-alpha above 0"):
        parse_config(["--manifold-mixup"])


def test_a_schedule_to_the_end_holds_the_end_of_a_resumed_run():
    for options, may in (
        ([], True),
        (["--lr-decay", "cosine"], False),
        (["--lr-decay", "cosine", "--epochs", "2"], True),
    ):
        config = parse_config(options).config
        assert ("max_updates" in may_differ(config)) == may
    rate = vision.learning_rate(parse_config(["--lr-decay", "cosine"]).config, 100, 4, 500)
    assert rate(1) == pytest.approx(0.1, rel=1e-4)
    assert rate(250) == pytest.approx(0.05)


def test_drop_path_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"--drop-path 0.2: resnet20 has none"):
        vision.build(TINY.config.__class__(network="resnet20", drop_path=0.2), 10, 0)
    with pytest.raises(UserError, match="from 0 to below 1, got 1"):
        parse_config(["--drop-path", "1"])


def test_list_presets_shows_every_row_of_table_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--list-presets"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    table_2 = [line for line in lines if not line.split()[0].endswith("-mixup") and "." in line.split()[-1]]
    assert len(table_2) == 12
    assert next(line for line in lines if line.startswith("amoebanet-cifar10 ")).split()[-3:] == [
        "98.16",
        "98.10",
        "98.24",
    ]


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_evaluation_sees_every_image_once_without_t(batch_size):
    _, images, views = pipelines()
    model = vision.build(TINY.config, 10, 0)
    loss_model = VisionLoss(model, 0.3).train()
    got = evaluate(Accelerator(cpu=True), loss_model, images.valid, views, batch_size, "valid")
    assert loss_model.training
    logits = model.eval()(views.normalize(images.valid.tensor))
    assert got["valid_loss"] == pytest.approx(float(F.cross_entropy(logits, images.valid.labels).detach()), rel=1e-5)
    assert got["valid_accuracy"] == pytest.approx(float((logits.argmax(1) == images.valid.labels).double().mean()))


# ---- ranks

TWO_RANKS = """
import json
import sys
import torch
from distributed import report
from tasks.vision import train as vision
from tasks.vision.data import sources
import test_vision as tests
from test_vision import Accelerator, Views, VisionLoss, evaluate, load_images

folder, changes = sys.argv[1:]
sources._DRAWN = tests.DRAWN
whole = vision.TrainStep.__call__
ranks = []

def call(self, batches, *, update):
    ranks[:] = [self.accelerator.num_processes]
    return whole(self, batches, update=update)

accelerator, images = Accelerator(), load_images(None)
network = VisionLoss(vision.build(tests.TINY.config, 10, 0))
scores = evaluate(accelerator, network, images.valid, Views.of(tests.TINY.config, images), 7, "valid")
mask = torch.rand(8).tolist()
vision.TrainStep.__call__ = call
vision.train(tests.TINY.changed(cpu=False, output_dir=folder, **json.loads(changes)))
report([*ranks, scores, mask])
"""


@pytest.mark.slow
@pytest.mark.trap(13)
@pytest.mark.trap(43)
def test_two_ranks_do_the_run_of_one_rank_that_accumulates_two_batches(tmp_path):
    options = {"max_updates": 2, "save_every": 2, "eval_every": 2}
    (ranks, scores, mask), other = run_ranks(TWO_RANKS, 2, args=[str(tmp_path / "two"), json.dumps(options)])
    assert (ranks, scores) == (2, other[1])
    assert mask != other[2]  # what the network draws
    one = run(tmp_path / "one", accumulation=2, **options)
    for a, b in zip(rows(tmp_path / "two"), rows(one), strict=True):
        assert (a["lr"], a["unique_samples"], a["target_labels"]) == (b["lr"], b["unique_samples"], b["target_labels"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    a_rank_s_own = ("running", "tracked")
    assert_same_weights(one, tmp_path / "two", update=2, but=a_rank_s_own, rtol=1e-3, atol=1e-4)
    _, images, views = pipelines()
    network = VisionLoss(vision.build(TINY.config, 10, 0))
    alone = evaluate(Accelerator(cpu=True), network, images.valid, views, 30, "valid")
    assert scores == pytest.approx(alone, rel=1e-5)


# ---- regimes


def test_the_regimes_of_presets_are_the_published_ones():
    def rates(preset, epochs, data="x"):
        config = parse_config(["--preset", preset, "--data", data]).config
        rate = vision.learning_rate(config, 100, 4, 500)
        return [rate(round(epoch * 100) + 1) for epoch in epochs]

    assert rates("resnet44-cifar10", [0, 80.99, 81, 99.99]) == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert rates("vgg16-cifar100", [0, 60, 120, 160]) == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    assert rates("alexnet-imagenet", [0, 10, 15, 20, 25]) == pytest.approx([0.01, 5e-3, 1e-3, 5e-4, 1e-4])
    assert rates("resnet50-imagenet-23-epochs", [0, 15, 20, 22]) == pytest.approx([0.1, 0.01, 1e-3, 1e-4])
    large = rates("resnet50-imagenet-large-batch", [0, 2.49, 5, 30])
    assert large == pytest.approx([3.2 / 500, 3.2 / 2, 3.2, 0.32])
    scaled = dataclasses.replace(TINY.config, learning_rate=0.1, lr_power=0.5)
    assert vision.learning_rate(scaled, 10, 9, 500)(1) == pytest.approx(0.3)


def test_weight_decay_ends_where_the_preset_says(tmp_path, monkeypatch):
    seen = []
    whole = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.append([group["weight_decay"] for group in self.param_groups])
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run(tmp_path / "run", weight_decay=0.1, weight_decay_epochs=0.5)  # of an epoch of 6 updates
    assert seen == [[0.1, 0.0]] * 3 + [[0.0, 0.0]] * 6


@pytest.mark.parametrize(
    ("preset", "ba_m", "network"),
    [
        ("resnet44-cifar10", 40, "resnet44"),
        ("vgg16-cifar10", 32, "vgg16-cifar"),
        ("resnet44-cifar100", 40, "resnet44"),
        ("wrn28-10-cifar10", 6, "wrn28-10"),
        ("wrn28-10-cifar100", 10, "wrn28-10"),
        ("densenet100-12-cifar100", 4, "densenet100-12"),
        ("resnet44-cifar10-mixup", 10, "resnet44"),
        ("alexnet-imagenet", 8, "torchvision/alexnet"),
        ("mobilenet-imagenet", 4, "mobilenet-v1"),
        ("resnet50-imagenet", 4, "torchvision/resnet50"),
    ],
)
def test_presets_have_the_papers_m_and_their_t_reaches_the_network(preset, ba_m, network):
    options = parse_config(["--preset", preset, "--data", "x"])
    config = options.config
    assert (options.copies.ba_m, config.network) == (ba_m, network)
    images = load_images(None)
    made = vision.make_pipeline(options, Accelerator(cpu=True), images, Views.of(config, images), (0, 1))
    one, other = made.transformed(made.first(1, 0), (0, 1))
    assert not torch.equal(one, other)
    assert one.shape[-1] == (config.image_size or 32)


# ---- what is refused


@pytest.mark.trap(34)
def test_identical_copies_are_refused_where_neither_t_nor_dropout_is_left(tmp_path):
    with pytest.raises(UserError, match="identical copies are refused; give --flip"):
        run(tmp_path / "still", **STILL)
    assert not (tmp_path / "still" / "metrics.jsonl").exists()
    run(tmp_path / "dropout", network="torchvision/squeezenet1_1", max_updates=1, **STILL)  # its own dropout is T


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "torchvision/alexnet"}, "torchvision/alexnet does not take images of 32 x 32 pixels: .*too small"),
        ({"network": "torchvision/vit_b_16"}, "torchvision/vit_b_16 does not take images of 32 x 32 pixels"),
        ({"network": "torchvision/squeezenet1_1", "ghost_batch_size": 4}, "--ghost-batch-size: .* has no batch norm"),
        ({"lr_drops": [0.01, 0.02]}, "--lr-drops 0.01 0.02: two of them fall on one update, as an epoch has 6"),
    ],
)
def test_what_a_network_cannot_do_is_refused_before_a_folder_is_made(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_networks_with_classifiers_beside_the_last_one_are_made_without_them(tmp_path):
    folder = run(tmp_path / "run", network="torchvision/googlenet", image_size=64, max_updates=1, eval_every=1)
    assert load_classifier(str(folder / "model")).model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_a_batch_larger_than_the_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="40 training images do not fill a batch of --batch-size 41"):
        run(tmp_path / "run", batch_size=41)


OPTIONS = [
    option
    for part in (VisionConfig, BatchAugmentationArguments, RunOptions, MachineOptions)
    for option in dataclasses.fields(part)
]


def test_every_option_has_help_and_every_preset_names_options():
    assert all(len(option.metadata["help"]) > 5 for option in OPTIONS)
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for name, values in PRESETS.items():
        assert values.keys() <= {option.name for option in OPTIONS}
        assert parse_config(["--preset", name, "--data", "x", "--no-cutout"]).config.cutout is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--auto-augment", "more"], "--auto-augment must be one of none, autoaugment, .* got more"),
        (["--label-smoothing", "1"], "--label-smoothing is a probability, from 0 to below 1, got 1"),
        (["--lr-drops", "5", "3"], r"--lr-drops must rise, be above 0 and finite, got 5\.0 3\.0"),
        (["--lr-factors", "0.1", "0.2", "0.3"], "--lr-factors must be one number for all of --lr-drops or 2, each"),
        (["--random-resized-crop"], "--crop-padding and --random-resized-crop are two ways to crop"),
        (["--random-resized-crop", "--crop-padding", "0"], "--random-resized-crop needs --image-size"),
        (["--mixup-alpha", "0.2", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["--ghost-batch-size", "1"], "--ghost-batch-size must be at least 2, or 0 for a copy's whole batch, got 1"),
        (["--lr-power", "1000"], "--lr-power must be from -10 to 10, got 1000"),
        (["--weight-decay-epochs", "-3"], "--weight-decay-epochs must be at least 0 and finite, got -3"),
        (["--epochs", "0"], "--epochs must be above 0 and finite, got 0"),
        (["--mixup-alpha", "-1"], "--mixup-alpha must be at least 0 and finite, got -1"),
        (["--preset", "resnet50-imagenet"], "^--preset resnet50-imagenet needs --data$"),
        (["--preset", "resnet44-cifar10"], r"needs --data, or \$SEQBA_DATA for a folder that holds cifar10/"),
        (["--lr", "1"], "unknown option --lr 1"),
    ],
)
def test_a_bad_option_is_named_with_its_limit(argv, message, monkeypatch):
    monkeypatch.delenv("SEQBA_DATA", raising=False)
    with pytest.raises(UserError, match=message):
        parse_config(argv)


def test_the_run_folder_says_network_data_and_m():
    assert run_folder(parse_config(["--network", "torchvision/resnet18", "--ba-m", "4"])) == (
        "runs/vision-torchvision-resnet18-generated-m4-seed0"
    )


def test_a_folder_that_is_no_classifier_or_a_damaged_one_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match=r"holds no classifier: it has no config\.json"):
        load_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "awd_lstm"}')
    with pytest.raises(UserError, match=r"holds no classifier of train_vision\.py: its config\.json names no network"):
        load_classifier(str(tmp_path))
    assert load_classifier(str(finished)).classes == load_classifier(str(finished / "model")).classes  # of a run folder
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((finished / "model" / name).read_bytes()[:50])
        with pytest.raises(UserError, match="holds a damaged classifier"):
            load_classifier(str(tmp_path))
        (tmp_path / name).write_bytes((finished / "model" / name).read_bytes())
    assert math.isfinite(sum(float(p.detach().sum()) for p in load_classifier(str(tmp_path)).model.parameters()))


@pytest.mark.slow
def test_the_script_trains_from_the_command_line(tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "train_vision.py"
    options = ["--max-updates", "1", "--eval-every", "1", "--batch-size", "8", "--num-threads", "1", "--ba-m", "2"]
    done = subprocess.run(
        [sys.executable, script, *options, "--output-dir", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "test: top-1 accuracy" in done.stdout
    assert "an update has 8 unique images, each 2 times" in done.stdout
