"""Losses that are no model's token loss: over samples, of the user's own, shifted or not, without targets."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer

from seqba.trainer import BatchAugmentationMixin, BatchAugmentationTrainer
from tiny_models import FAMILIES, VOCABULARY, gradients
from trainers import (
    ACCUMULATED,
    IDENTICAL,
    Pad,
    Samples,
    assert_close,
    batches_of,
    check_plans,
    token_gradient,
    trainer_gradients,
)
from trainers import few_objects_to_collect as few_objects_to_collect


def bert(problem_type, num_labels):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=num_labels,
        problem_type=problem_type,
    )
    return BertForSequenceClassification(config)


TARGETS = {
    "single_label_classification": (4, lambda n: torch.tensor(n % 4), F.cross_entropy),
    "regression": (1, lambda n: torch.tensor(float(n)), lambda x, y: F.mse_loss(x[:, 0], y)),
    "multi_label_classification": (
        4,
        lambda n: torch.tensor([n % 2, 1, 0, n % 3 == 0]).float(),
        F.binary_cross_entropy_with_logits,
    ),
}


class Labelled(Samples):
    def __init__(self, label, count):
        super().__init__("bert", count)
        self.rows = [{**row, "labels": label(n)} for n, row in enumerate(self.rows)]


class PadLabelled(Pad):
    def __call__(self, samples):
        padded = super().__call__([{**sample, "labels": sample["input_ids"]} for sample in samples])
        return {**padded, "labels": torch.stack([sample["labels"] for sample in samples])}


@pytest.mark.trap(9)
@pytest.mark.parametrize("problem_type", TARGETS)
def test_a_loss_over_samples_is_their_mean_over_the_update(problem_type, tmp_path):
    num_labels, label, loss = TARGETS[problem_type]
    model, data = bert(problem_type, num_labels), Labelled(label, 5)
    batch = PadLabelled()([data[n] for n in range(5)])
    labels = batch.pop("labels")
    loss(model(**batch).logits, labels).backward()
    want = gradients(model)
    model.zero_grad()
    check_plans(tmp_path, model, data, want, collator=PadLabelled(), settings=ACCUMULATED)


def test_a_plain_trainer_adds_the_means_of_accumulated_batches_of_a_classifier(tmp_path):
    num_labels, label, loss = TARGETS["single_label_classification"]
    model, data = bert("single_label_classification", num_labels), Labelled(label, 5)
    collate = PadLabelled()
    for batch in batches_of(data, collate=collate):
        labels = batch.pop("labels")
        loss(model(**batch).logits, labels).backward()
    check_plain(tmp_path, model, data, collate)


def test_a_plain_trainer_averages_the_means_of_batches_where_the_loss_is_given_no_number_of_items(tmp_path):
    model, data = Bare(shifts=False), Samples("bare", 5)
    for batch in batches_of(data, collate=PadBare()):
        (model(**batch)["loss"] / 2).backward()
    check_plain(tmp_path, model, data, PadBare())


def check_plain(folder, model, data, collator):
    """The gradient of a plain Trainer is the one that the model has now."""
    want = gradients(model)
    model.zero_grad()
    (got,) = trainer_gradients(folder, model, data, trainer_class=Trainer, collator=collator, settings=ACCUMULATED)
    assert_close(got, want)


def summed_over_items(outputs, labels, num_items_in_batch=None):
    loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


def mean_of_batch(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def summed_by_hand(outputs, labels, num_items_in_batch=None):
    """Takes the number out of its tensor, so that no graph shows that the loss divides by it."""
    loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / int(num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


class WithCopiedLoss:
    """A user's `compute_loss` that does not look at the number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = mean_of_batch(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class WithScaledLoss:
    """A user's `compute_loss` that divides its mean by the accumulation steps itself."""

    loss_is_scaled_for_ga = True
    current_gradient_accumulation_steps: int  # the Trainer's

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return mean_of_batch(model(**inputs), inputs["labels"]) / self.current_gradient_accumulation_steps


class Below(BatchAugmentationMixin, WithCopiedLoss, Trainer):
    pass


class Above(WithCopiedLoss, BatchAugmentationTrainer):
    pass


class AboveScaled(WithScaledLoss, BatchAugmentationTrainer):
    pass


class PlainScaled(WithScaledLoss, Trainer):
    pass


@pytest.mark.parametrize("copies", [(1, 1), (3, 1), (3, 2)])
def test_a_loss_that_says_it_is_scaled_is_taken_at_its_word(copies, tmp_path):
    model, data = FAMILIES["bart"](dropout=0.0), Samples("bart", 5)
    (want,) = trainer_gradients(tmp_path, model, data, trainer_class=PlainScaled, settings=ACCUMULATED)
    options = {"ba_m": copies[0], "copies_per_pass": copies[1], "settings": ACCUMULATED, **IDENTICAL}
    (got,) = trainer_gradients(tmp_path, model, data, trainer_class=AboveScaled, **options)
    assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("trainer_class", [Below, Above])
def test_an_overridden_compute_loss_is_weighted_wherever_it_stands(trainer_class, tmp_path):
    check_custom(tmp_path, trainer_class=trainer_class)


@pytest.mark.parametrize("function", [summed_over_items, mean_of_batch, summed_by_hand])
def test_a_compute_loss_func_is_right_whether_it_divides_by_the_items_or_not(function, tmp_path):
    check_custom(tmp_path, compute_loss_func=function, collator="with decoder inputs")


def check_custom(folder, *, collator=None, **options):
    model, data = FAMILIES["bart"](dropout=0.0), Samples("bart", 5)
    collator = Pad(model if collator else None)
    want = token_gradient(model, batches_of(data, collate=collator))
    check_plans(folder, model, data, want, collator=collator, settings=ACCUMULATED, **options)


class Bare(nn.Module):
    """No configuration, no `**kwargs`: the Trainer gives its loss no number of items."""

    def __init__(self, shifts):
        super().__init__()
        self.embedding, self.out, self.shifts = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY), shifts

    def forward(self, input_ids, labels):
        logits = self.out(self.embedding(input_ids))
        if self.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class PadBare(Pad):
    def __call__(self, samples):
        padded = super().__call__(samples)
        return {name: padded[name] for name in ("input_ids", "labels")}


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("first_label", [None, -100])
def test_whether_a_loss_shifts_its_labels_is_found_by_asking_it(shifts, first_label, tmp_path):
    model, data = Bare(shifts), Samples("bare", 5)
    if first_label is not None:
        for n in (0, 1, 2):  # the first batch has no first labels, the second does
            data.rows[n]["labels"][0] = first_label
    losses = []
    for batch in batches_of(data, collate=PadBare()):
        labels = batch["labels"][:, 1:] if shifts else batch["labels"]
        losses.append((model(**batch)["loss"], int((labels != -100).sum())))
    (sum(loss * count for loss, count in losses) / sum(count for _, count in losses)).backward()
    want = gradients(model)
    model.zero_grad()
    check_plans(tmp_path, model, data, want, collator=PadBare(), settings=ACCUMULATED)


class Unlabelled(Bare):
    """A loss of the inputs alone, over samples, although there are labels."""

    def forward(self, input_ids, labels):
        return {"loss": self.out(self.embedding(input_ids)).pow(2).mean((1, 2)).mean()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_does_not_look_at_the_labels_is_a_mean_over_samples(accumulation, tmp_path):
    model, data = Unlabelled(False), Samples("bare", 5 if accumulation == 2 else 3)
    for row in data.rows:
        row["input_ids"] = row["labels"] = row["input_ids"][:1]
    model(**PadBare()(data.rows))["loss"].backward()
    want = gradients(model)
    model.zero_grad()
    settings = {"gradient_accumulation_steps": accumulation}
    check_plans(tmp_path, model, data, want, collator=PadBare(), settings=settings)


@pytest.mark.parametrize("family", ["marian", "llama"])
@pytest.mark.parametrize("where", [0, 1, None])
def test_a_batch_without_targets_adds_nothing(family, where, tmp_path):
    model, data = FAMILIES[family](dropout=0.0), Samples(family, 6)
    batches = batches_of(data)
    for n in range(6) if where is None else range(3 * where, 3 * where + 3):
        data.rows[n]["labels"] = torch.full_like(data.rows[n]["labels"], -100)
    want = token_gradient(model, batches if where is None else [batches[1 - where]])
    if where is None:  # an update without any
        want = {name: torch.zeros_like(x) for name, x in want.items()}
    check_plans(tmp_path, model, data, want, settings=ACCUMULATED)


def test_a_loss_that_is_a_sum_over_rows_runs_one_copy_a_pass(tmp_path):
    def summed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")

    model, data = FAMILIES["bart"](dropout=0.0), Samples("bart", 3)
    options = {"collator": Pad(model), "compute_loss_func": summed}
    (want,) = trainer_gradients(tmp_path, model, data, trainer_class=Trainer, **options)
    for ba_m in (1, 3):
        (got,) = trainer_gradients(tmp_path, model, data, ba_m=ba_m, **options, **IDENTICAL)
        assert_close(got, want, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"the loss is a sum over the rows of a batch.*set copies_per_pass=1"):
        trainer_gradients(tmp_path, model, data, ba_m=3, copies_per_pass=3, **options, **IDENTICAL)
