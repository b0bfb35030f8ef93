"""The noise of a gradient while it is trained on: against gradients taken by themselves, and nothing is disturbed."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from seqba import CarriedState, TrainStep
from seqba.analysis import split_variance
from seqba.analysis.live import noise_of_halves, pick_rows
from tasks.language_modelling.config import parse_config as parse_language
from tasks.language_modelling.train import train as train_language
from tasks.run.log import read_metrics
from tasks.translation.config import parse_config as parse_translation
from tasks.translation.train import train as train_translation
from tasks.vision.config import parse_config as parse_vision
from tasks.vision.train import train as train_vision
from tiny_models import batch_for, count, llama, marian, summed_nll
from trainers import Samples, make

TINY = {
    "translation": (
        train_translation,
        parse_translation,
        ["--num-layers", "1", "--width", "32", "--max-tokens", "128"],
    ),
    "language": (
        train_language,
        parse_language,
        ["--embedding-size", "16", "--hidden-size", "16", "--batch-size", "4"],
    ),
    "vision": (train_vision, parse_vision, ["--batch-size", "8", "--train-images", "64", "--valid-images", "32"]),
}


def step_of(model, *, accelerator=None, lr=0.01, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    return TrainStep(
        accelerator or Accelerator(cpu=True), model.train(), optimizer, loss_fn=summed_nll, count_fn=count, **options
    )


def flat(gradients):
    return torch.cat([x.flatten().double() for x in gradients])


@pytest.mark.parametrize(("copies_per_pass", "accumulation"), [(1, 1), (1, 2), (2, 1)])
def test_the_noise_from_the_passes_is_that_of_their_gradients(copies_per_pass, accumulation, monkeypatch):
    model, kept = marian(dropout=0.3), []
    batches = [batch_for("marian", 4 + i, seed=i) for i in range(accumulation)]
    accelerator = Accelerator(cpu=True)
    plain = accelerator.backward

    def accumulated():
        return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())

    def backward(loss):
        before = accumulated()
        plain(loss)
        kept.append(accumulated() - before)

    monkeypatch.setattr(accelerator, "backward", backward)
    options = {"num_copies": 4, "copies_per_pass": copies_per_pass, "noise_every": 7, "accelerator": accelerator}
    result = step_of(model, **options)(batches, update=4)
    passes = torch.stack(kept[: 4 // copies_per_pass]).double()
    share = int(count(batches[0])) / int(result.num_targets) * copies_per_pass  # of a pass's mean gradient
    want = 4 * copies_per_pass * (passes / share).var(0).sum()
    assert float(result.noise_within) == pytest.approx(float(want), rel=1e-4)
    assert result.noise_between is None


class Masks(nn.Module):
    """A linear model whose T drops its inputs."""

    def __init__(self):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.4), nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(self.drop(x)).squeeze(1)


def test_halves_give_the_split_of_their_gradients():
    torch.manual_seed(0)
    model, x, y = Masks(), torch.randn(6, 3), torch.randn(6)
    kept = []

    def loss_of(copy, rows):
        loss = 8 * (model(x[rows]) - y[rows]).square().mean()
        kept.append(flat(torch.autograd.grad(loss / 8, list(model.parameters()), retain_graph=True)))
        return loss

    within, between = noise_of_halves(model, loss_of, 6, copies=(0, 1), seed=(1, 2), scale=8.0)
    want = split_variance(torch.stack(kept).view(2, 2, -1), 3)
    assert (float(within), float(between)) == pytest.approx((want.within, want.between), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_halves_are_unbiased_over_many_updates():
    torch.manual_seed(1)
    size = 5  # halves of three and of two
    model, x, y = Masks(), torch.randn(size, 3), torch.randn(size)

    def loss_of(copy, rows):
        return (model(x[rows]) - y[rows]).square().mean()

    with torch.no_grad():  # of one sample the gradient is 2 (w.x - y) (x, 1), under all masks
        masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        chances = 0.6 ** masks.sum(1) * 0.4 ** (3 - masks.sum(1))
        dropped = x[:, None] * masks / 0.6
        errors = 2 * (model.linear(dropped).squeeze(-1) - y[:, None])
        gradients = torch.cat([errors[..., None] * dropped, errors[..., None]], -1)
    means = torch.einsum("nmd,m->nd", gradients, chances)
    within = float(torch.einsum("nmd,m->n", (gradients - means[:, None]).square(), chances).mean())
    between = float(means.var(0).sum())  # of samples without replacement: over B - 1
    found = torch.tensor([noise_of_halves(model, loss_of, size, copies=(0, 1), seed=(u,)) for u in range(800)])
    assert found.mean(0).tolist() == pytest.approx([within, between], rel=0.15)


@pytest.mark.parametrize(
    ("num_copies", "copies_per_pass", "seed"), [(4, 1, None), (4, 4, None), (1, 1, None), (4, 3, 5)]
)
def test_measuring_changes_no_weight_and_no_loss(num_copies, copies_per_pass, seed):
    found = []
    for noise_every in (0, 2):
        torch.manual_seed(0)
        model = marian(dropout=0.3)
        options = {"num_copies": num_copies, "copies_per_pass": copies_per_pass, "copy_seed": seed}
        step = step_of(model, noise_every=noise_every, **options)
        results = [step([batch_for("marian", 5, seed=u)], update=u) for u in range(1, 5)]
        found.append((flat(p.detach() for p in model.parameters()), [float(r.loss) for r in results]))
        measured = [r.noise_between is not None for r in results]
        assert measured == ([False, True] * 2 if noise_every else [False] * 4)
        assert all((r.noise_within is not None) == m for r, m in zip(results, measured, strict=True))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_half_takes_the_carried_states_of_its_samples():
    state = CarriedState(lambda rows: torch.zeros(rows, 2), dim=0)
    seen = []

    class Adds(nn.Linear):
        def forward(self, x, hidden):  # type: ignore[override]
            seen.append((x[:, 0].tolist(), hidden[:, 0].tolist()))
            return super().forward(x + hidden), hidden + x

    def loss_fn(model, rows):
        output, hidden = model(rows["labels"], state.take(len(rows["labels"])))
        state.keep(hidden)
        return output.sum()

    model = Adds(2, 1)
    step = TrainStep(
        Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), 0.0), loss_fn=loss_fn,
        count_fn=lambda rows: len(rows["labels"]), num_copies=2, carried=[state], noise_every=2,
    )  # fmt: skip
    batch = {"labels": torch.arange(4.0)[:, None].repeat(1, 2)}
    step([batch], update=1)
    seen.clear()
    step([batch], update=2)
    *halves, update = seen
    assert len(halves) == 4
    assert all(x == hidden for x, hidden in halves), "a sample met another one's state"
    assert sorted(halves[0][0] + halves[2][0]) == [0, 1, 2, 3]
    assert update[1] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("copies_per_pass", [1, 4])
def test_a_trainer_logs_both_and_trains_the_same(tmp_path, copies_per_pass):
    found = []
    for noise_every in (0, 2):
        torch.manual_seed(0)
        model = llama(dropout=0.2)
        settings = {"learning_rate": 0.1, "logging_strategy": "steps", "logging_steps": 2, "max_steps": 4}
        options = {"ba_m": 4, "copies_per_pass": copies_per_pass, "noise_every": noise_every, "settings": settings}
        trainer = make(tmp_path, model, Samples("llama", 12), **options)
        trainer.train()
        found.append(flat(p.detach() for p in model.parameters()))
        lines = [line for line in trainer.state.log_history if "learning_rate" in line]
        for name in ("noise_within", "noise_between"):
            assert all((name in line) == bool(noise_every) for line in lines)
    assert len(lines) == 2
    assert torch.equal(*found)


@pytest.mark.slow
def test_a_trainers_noise_is_the_same_from_passes_as_from_halves(tmp_path):
    means = []
    for copies_per_pass in (1, 2):
        torch.manual_seed(0)
        settings = {"logging_strategy": "steps", "logging_steps": 80, "max_steps": 80, "gradient_accumulation_steps": 2}
        options = {"ba_m": 2, "copies_per_pass": copies_per_pass, "noise_every": 1, "settings": settings}
        trainer = make(tmp_path, llama(dropout=0.3), Samples("llama", 12), **options)
        trainer.train()
        means.append(trainer.state.log_history[0]["noise_within"])
    assert means[0] == pytest.approx(means[1], rel=0.15)


@pytest.mark.parametrize(
    "task", ["language", *(pytest.param(t, marks=pytest.mark.slow) for t in ("translation", "vision"))]
)
def test_the_rows_of_a_script_have_both_and_its_weights_are_the_same(task, tmp_path):
    train, parse, sizes = TINY[task]
    weights = []
    for noise_every in (0, 2):
        folder = tmp_path / str(noise_every)
        cadence = ["--max-updates", "4", "--log-every", "2", "--eval-every", "4", "--save-every", "4"]
        own = ["--cache-dir", str(tmp_path / "cache")] if task == "translation" else []
        train(parse([*sizes, *cadence, *own, "--output-dir", str(folder), "--ba-m", "2", "--copies-per-pass", "1",
                     "--noise-every", str(noise_every)]))  # fmt: skip
        rows = read_metrics(folder / "metrics.jsonl")
        for name in ("noise_within", "noise_between"):
            assert [row.get(name) is not None for row in rows] == [bool(noise_every)] * 2, rows
        weights.append((folder / "model" / "model.safetensors").read_bytes())
        assert json.loads((folder / "config.json").read_text())["noise_every"] == noise_every
    assert weights[0] == weights[1]


def test_what_cannot_be_measured_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"noise_every must be at least 0, and 0 for a model sharded .* got -1"):
        step_of(marian(), noise_every=-1)
    with pytest.raises(ValueError, match=r"table has 7 rows, not one for each of 2 samples.*set noise_every to 0"):
        pick_rows({"labels": torch.zeros(2, 3), "table": torch.zeros(7)}, torch.tensor([0]))
    assert noise_of_halves(Masks(), lambda *_: torch.zeros(()), 1, copies=(0, 1), seed=(0,))[0].isnan()
