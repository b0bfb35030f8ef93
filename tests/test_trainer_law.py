"""The gradient law: the summed loss of all copies, passes and batches of an update, over all their targets."""

import itertools

import pytest
import torch
from transformers import Trainer

from seqba.draws.streams import copy_streams
from seqba.trainer import BatchAugmentationTrainer
from tiny_models import EVERY_FAMILY, FAMILIES, OTHER_ENCODER_DECODERS, gradients
from trainers import (
    IDENTICAL,
    PLANS,
    QUICK_PLANS,
    Pad,
    Samples,
    Stream,
    arguments,
    assert_close,
    batches_of,
    check_plans,
    collator_of,
    make,
    token_gradient,
    token_loss,
    trainer_gradients,
)
from trainers import few_objects_to_collect as few_objects_to_collect


def settings_of(label_smoothing, accumulation):
    return {"label_smoothing_factor": label_smoothing, "gradient_accumulation_steps": accumulation}


def check_law(family, model, label_smoothing, accumulation, plans, folder):
    data = Samples(family, 5 if accumulation == 2 else 3)  # accumulated: a batch of 3 and one of 2
    collator = collator_of(family, model, label_smoothing)
    want = token_gradient(model, batches_of(data, collate=collator), label_smoothing)
    settings = settings_of(label_smoothing, accumulation)
    check_plans(folder, model, data, want, plans=plans, collator=collator, settings=settings)


CELLS = list(itertools.product(FAMILIES, [0.0, 0.1], [1, 2]))


@pytest.mark.trap(8)
@pytest.mark.trap(9)
@pytest.mark.parametrize(("family", "label_smoothing", "accumulation"), CELLS)
def test_the_gradient_is_that_of_the_mean_token_loss(family, label_smoothing, accumulation, tmp_path):
    check_law(family, FAMILIES[family](dropout=0.0), label_smoothing, accumulation, QUICK_PLANS, tmp_path)


@pytest.mark.slow
@pytest.mark.trap(8)
@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize(("label_smoothing", "accumulation"), list(itertools.product([0.0, 0.1], [1, 2])))
def test_the_gradient_is_that_of_the_mean_token_loss_under_every_plan(family, label_smoothing, accumulation, tmp_path):
    check_law(family, EVERY_FAMILY[family](dropout=0.0), label_smoothing, accumulation, PLANS, tmp_path)


@pytest.mark.parametrize("family", ["marian", "llama"])
def test_the_gradient_over_an_iterable_data_set_is_the_law_too(family, tmp_path):
    model, data = FAMILIES[family](dropout=0.0), Samples(family, 5)
    want = token_gradient(model, batches_of(data))
    check_plans(tmp_path, model, Stream(data), want, settings={"gradient_accumulation_steps": 2, "max_steps": 1})


@pytest.mark.trap(9)
@pytest.mark.parametrize("family", OTHER_ENCODER_DECODERS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_encoder_decoders_that_ignore_the_number_of_items_are_right_too(family, label_smoothing, tmp_path):
    check_law(family, OTHER_ENCODER_DECODERS[family](dropout=0.0), label_smoothing, 2, [(3, 2)], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_with_dropout_and_streams_the_gradient_is_the_sum_over_copies_that_were_run_one_by_one(
    family, label_smoothing, tmp_path
):
    model, data, seed = FAMILIES[family](dropout=0.3), Samples(family, 5), 11
    collator = collator_of(family, model, label_smoothing)
    batches = batches_of(data, collate=collator)
    model.train()
    tokens = 4 * sum(token_loss(model, batch)[1] for batch in batches)
    for (shard, batch), copy in itertools.product(enumerate(batches), range(4)):
        with copy_streams((copy,), seed=seed, update=1, shard=shard):
            (token_loss(model, batch, label_smoothing)[0] / tokens).backward()
    want = gradients(model)
    model.zero_grad()
    for copies_per_pass in (1, 3, 4):
        (got,) = trainer_gradients(
            tmp_path,
            model,
            data,
            collator=collator,
            settings={**settings_of(label_smoothing, 2), "seed": seed},
            ba_m=4,
            copies_per_pass=copies_per_pass,
            reproducible_copies=True,
            **IDENTICAL,
        )
        assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["marian", "llama"])
@pytest.mark.parametrize(("num_copies", "copies_per_pass"), QUICK_PLANS)
def test_the_loss_that_is_logged_is_the_mean_token_loss(family, num_copies, copies_per_pass, tmp_path):
    model, data = FAMILIES[family](dropout=0.0), Samples(family, 5)
    with torch.no_grad():
        losses, counts = zip(*(token_loss(model, batch) for batch in batches_of(data)), strict=True)
    options = {"ba_m": num_copies, "copies_per_pass": copies_per_pass, **IDENTICAL}
    trainer = make(tmp_path, model, data, settings={"gradient_accumulation_steps": 2}, **options)
    assert trainer.train().training_loss == pytest.approx(float(sum(losses)) / sum(counts), rel=1e-5)


# ---- one copy


def trained(folder, model, data, trainer_class, settings, collator=None):
    """The weights after three updates, and the losses that were logged."""
    torch.manual_seed(5)
    args = arguments(
        folder, learning_rate=0.1, logging_strategy="steps", logging_steps=1, max_grad_norm=0.5, **settings
    )
    trainer = trainer_class(model=model, args=args, train_dataset=data, data_collator=collator or Pad())
    trainer.train()
    kept = ("loss", "grad_norm", "learning_rate", "epoch", "train_loss")
    return model.state_dict(), [{k: row[k] for k in kept if k in row} for row in trainer.state.log_history]


@pytest.mark.parametrize(
    ("family", "label_smoothing", "accumulation", "extra"),
    [
        ("marian", 0.0, 1, {}),  # one batch an update: the mean over its tokens is the reference
        ("t5", 0.1, 2, {}),  # the Trainer's own label smoothing divides by num_items_in_batch
        ("llama", 0.0, 2, {}),  # so does this model's loss
        ("llama", 0.0, 1, {"bf16": True}),
    ],
)
def test_one_copy_is_bitwise_a_plain_trainer(family, label_smoothing, accumulation, extra, tmp_path):
    data = Samples(family, 9 if accumulation == 1 else 18)
    runs = []
    for trainer_class in (Trainer, BatchAugmentationTrainer):
        torch.manual_seed(3)
        model = FAMILIES[family](dropout=0.2)
        collator = collator_of(family, model, label_smoothing)
        runs.append(
            trained(tmp_path, model, data, trainer_class, settings_of(label_smoothing, accumulation) | extra, collator)
        )
    (want, want_logs), (got, got_logs) = runs
    assert got_logs == want_logs
    assert len(got_logs) == 4
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize(
    ("family", "accumulation", "factor"),
    [("marian", 2, None), ("gpt2", 1, 12 / 15)],  # 3 rows of 15 labels, of which 12 are predicted
)
def test_where_a_plain_trainer_is_another_the_difference_is_the_documented_one(family, accumulation, factor, tmp_path):
    model, data = FAMILIES[family](dropout=0.0), Samples(family, 5 if accumulation == 2 else 3)
    (plain,) = trainer_gradients(
        tmp_path,
        model,
        data,
        trainer_class=Trainer,
        settings={"gradient_accumulation_steps": accumulation},
    )
    batches = batches_of(data)
    if factor is None:  # the sum of the batches' means
        means = [token_gradient(model, [batch]) for batch in batches]
        want = {name: sum(mean[name] for mean in means) for name in means[0]}
    else:
        want = {name: factor * x for name, x in token_gradient(model, batches).items()}
    assert_close(plain, want)
