"""The Trainer on two ranks over gloo: the gradient law, masks of their own, one plan for both."""

import itertools
import json
import random

import numpy as np
import pytest
import torch

from distributed import run_ranks
from seqba.draws.generators import rng_state, seeded_generators, set_rng_state
from tiny_models import EVERY_FAMILY
from trainers import PLANS, QUICK_PLANS, Pad, Samples, collator_of, summary, token_gradient

LAW = """
import gc, itertools, json, sys, tempfile
import torch
from distributed import report
from tiny_models import EVERY_FAMILY
from trainers import Samples, collator_of, summary, trainer_gradients

families, plans = json.loads(sys.argv[1])
folder = tempfile.mkdtemp()
found = {}
gc.freeze()
for family, smoothing, accumulation in itertools.product(families, (0.0, 0.1), (1, 2)):
    torch.manual_seed(0)
    model = EVERY_FAMILY[family](dropout=0.0)
    collator = collator_of(family, model, smoothing)
    settings = {"label_smoothing_factor": smoothing, "gradient_accumulation_steps": accumulation}
    for num_copies, copies_per_pass in plans:
        (gradient,) = trainer_gradients(
            folder, model, Samples(family, 6 * accumulation), collator=collator, settings=settings,
            ba_m=num_copies, copies_per_pass=copies_per_pass, allow_identical_copies=True,
        )
        cell = f"{family} {smoothing} {accumulation} {num_copies} {copies_per_pass}"
        found[cell] = summary(gradient)
report({"num_processes": torch.distributed.get_world_size(), "found": found})
"""


def check_law(families, plans, timeout=180):
    ranks = run_ranks(LAW, 2, args=[json.dumps([families, plans])], timeout=timeout)
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    assert ranks[0]["found"].keys() == ranks[1]["found"].keys()
    for family, smoothing, accumulation in itertools.product(families, (0.0, 0.1), (1, 2)):
        torch.manual_seed(0)
        model = EVERY_FAMILY[family](dropout=0.0)
        data = Samples(family, 6 * accumulation)
        batch = collator_of(family, model, smoothing)(data.rows)
        want = torch.tensor(summary(token_gradient(model, [batch], smoothing)))
        for num_copies, copies_per_pass in plans:
            cell = f"{family} {smoothing} {accumulation} {num_copies} {copies_per_pass}"
            for rank in ranks:
                got = torch.tensor(rank["found"][cell])
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=lambda m, cell=cell: f"{cell}: {m}")


@pytest.mark.trap(8)
@pytest.mark.trap(9)
def test_two_ranks_give_the_gradient_of_the_mean_over_all_their_tokens():
    check_law(["marian", "gpt2"], QUICK_PLANS)


@pytest.mark.slow
@pytest.mark.trap(9)
def test_two_ranks_give_the_gradient_of_the_mean_over_all_their_tokens_under_every_plan():
    check_law(list(EVERY_FAMILY), PLANS, timeout=1200)


MASKS = """
import sys
import torch
from torch import nn
from distributed import report
from seqba.trainer import BatchAugmentationTrainer
from trainers import Pad, trainer_gradients

folder = sys.argv[1]

class Resumed(BatchAugmentationTrainer):
    def train(self):
        return super().train(resume_from_checkpoint=folder + "/checkpoint-2")

class Shown(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.ones(())), nn.Dropout(0.5)
    def forward(self, input_ids, labels=None):
        logits = self.drop(self.weight.expand(len(input_ids), 64))
        return {"loss": logits.mean(), "logits": logits}

class Same(torch.utils.data.Dataset):
    def __len__(self): return 16
    def __getitem__(self, n): return {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}

def masks(**options):
    seen = []
    def loss(outputs, labels, num_items_in_batch=None):
        if torch.is_grad_enabled() and bool((outputs["logits"] == 0).any()):  # not in eval mode
            seen.append((outputs["logits"] != 0).int().tolist())
        return outputs["loss"]
    collate = lambda samples: {key: x for key, x in Pad()(samples).items() if key != "attention_mask"}
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "train_sampling_strategy": "random",
                "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer_gradients(folder, Shown(), Same(), collator=collate, compute_loss_func=loss,
                      settings=settings, **options)
    return seen

report({"processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 0,
        "drawn": masks(ba_m=3, copies_per_pass=3), "again": masks(ba_m=3, copies_per_pass=3),
        "resumed": masks(ba_m=3, copies_per_pass=3, trainer_class=Resumed),
        "streams": masks(ba_m=3, copies_per_pass=3, reproducible_copies=True),
        "passes": masks(ba_m=3, copies_per_pass=1, reproducible_copies=True)})
"""


@pytest.mark.trap(13)
@pytest.mark.trap(24)
def test_ranks_with_the_same_samples_draw_masks_of_their_own_in_every_epoch(tmp_path):
    ranks = run_ranks(MASKS, 2, args=[str(tmp_path)])
    for how in ("drawn", "streams"):
        batches = list(zip(*(rank[how] for rank in ranks), strict=True))
        assert len(batches) == 8  # two updates an epoch, two batches each
        rows = [tuple(row) for passes in batches for masks in passes for row in masks]
        assert len(rows) == 8 * 2 * 6
        assert len(set(rows)) == len(rows)
    for rank in ranks:
        assert rank["again"] == rank["drawn"]  # the same run again draws the same
        assert rank["resumed"] == rank["drawn"][4:]  # so does its second half after a resume
        fused = [row for masks in rank["streams"] for row in masks]
        assert [row for masks in rank["passes"] for row in masks] == fused  # copy-major, whatever the plan


@pytest.mark.trap(13)
def test_a_shard_draws_its_own_numbers_from_every_generator_and_the_runs_own_go_on():
    def drawn():
        return torch.rand(4).tolist(), np.random.rand(), random.random()

    start = rng_state()
    want = drawn()
    found = []
    keys = list(itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2)))  # their sums and products coincide
    for key in keys:
        set_rng_state(start)
        with seeded_generators(*key):
            found.append(drawn())
        assert drawn() == want
    for numbers in zip(*found, strict=True):
        assert len(set(map(str, numbers))) == len(keys)


OTHERS = """
import copy, logging, tempfile
import torch
from accelerate import PartialState
from distributed import report
from test_trainer_run import SmallMemory
from transformers import Trainer
from seqba.trainer import BatchAugmentationTrainer
from tiny_models import llama
from trainers import Samples, Seen, Stream, make, summary, trainer_gradients

folder = tempfile.mkdtemp()
torch.manual_seed(0)
model = llama(dropout=0.0)
def total(gradients):
    return [summary(gradient) for gradient in gradients]

own = trainer_gradients(folder, model, Samples("llama", 6), settings={"average_tokens_across_devices": False},
                        ba_m=3, copies_per_pass=2, allow_identical_copies=True)
rank = PartialState().process_index
small = SmallMemory(model, 6 if rank == 1 else 99)  # only rank 1 is short: two copies of its three samples fit
seen = Seen()
trainer = make(folder, small, Samples("llama", 12), ba_m=4, callbacks=[seen], allow_identical_copies=True)
trainer.train()
counts = []
evaluated = make(folder, model, ba_m=3, settings={"per_device_eval_batch_size": 4},
                 compute_metrics=lambda p: counts.append(len(p.predictions)) or {})
evaluated.evaluate()
predicted = evaluated.predict(Samples("llama", 13)).label_ids
class Own(BatchAugmentationTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("seqba").addHandler(handler)
kept = make(folder, model, Samples("llama", 6), trainer_class=Own, ba_m=4, allow_identical_copies=True)
kept.train()
logging.getLogger("seqba").removeHandler(handler)

late_seen = Seen()  # the model was evaluated, by this trainer and by others
late = make(folder, model, Samples("llama", 6), ba_m=4, callbacks=[late_seen], allow_identical_copies=True)
late.evaluate()
late.train()

own_reader = {"dispatch_batches": False}  # by default accelerate sends rank 0's batches, all of one length
streamed = trainer_gradients(folder, model, Stream(Samples("llama", 6)), ba_m=3, copies_per_pass=2,
                             settings={"max_steps": 1, "accelerator_config": own_reader}, allow_identical_copies=True)
dropping = llama(dropout=0.2)
plain = [
    trainer_gradients(folder, copy.deepcopy(dropping), Samples("llama", 12), settings={"learning_rate": 0.1},
                      trainer_class=trainer_class)
    for trainer_class in (Trainer, BatchAugmentationTrainer)
]
report({"counts": counts, "own": total(own),
        "said": said, "kept": kept.counters.copies_per_pass, "shrinks": kept._ba_run.loop.plan.may_shrink,
        "streamed": total(streamed), "after_evaluation": total(late_seen.gradients),
        "is_plain": all(torch.equal(one[name], other[name]) for one, other in zip(*plain) for name in one),
        "labels": [[int(label) for label in row if label != -100] for row in predicted],
        "short": total(seen.gradients),
        "copies_per_pass": trainer.counters.copies_per_pass,
        "unique": int(trainer.counters.unique_samples), "seen": int(trainer.counters.seen_instances),
        "targets": int(trainer.counters.target_tokens)})
"""


@pytest.fixture(scope="module")
def other_findings():
    return run_ranks(OTHERS, 2)


@pytest.mark.trap(7)
def test_rows_that_do_not_fill_the_batches_of_two_ranks_are_evaluated_once(other_findings):
    assert [rank["counts"] for rank in other_findings] == [[10, 13], [10, 13]]
    labels = [row["labels"].tolist() for row in Samples("llama", 13).rows]
    assert [rank["labels"] for rank in other_findings] == [labels, labels]


def test_ranks_agree_on_a_plan_count_together_and_may_average_by_rank(other_findings):
    ranks = other_findings
    torch.manual_seed(0)
    model, data = EVERY_FAMILY["llama"](dropout=0.0), Samples("llama", 12).rows
    assert [rank["copies_per_pass"] for rank in ranks] == [2, 2]
    assert [(rank["unique"], rank["seen"]) for rank in ranks] == [(12, 48), (12, 48)]
    targets = 4 * sum(len(row["labels"]) - 1 for row in data)
    assert [rank["targets"] for rank in ranks] == [targets, targets]
    updates = [token_gradient(model, [Pad()(data[i : i + 6])]) for i in (0, 6)]
    own = [token_gradient(model, [Pad()(rows)]) for rows in (data[0:3], data[3:6])]
    mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
    for rank in ranks:
        for got, want in zip([*rank["short"], *rank["own"]], [*updates, mean], strict=True):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(summary(want)), rtol=1e-3, atol=1e-5)


def test_auto_does_not_halve_around_a_loss_in_which_ranks_may_talk_and_says_so(other_findings):
    for rank in other_findings:
        assert (rank["kept"], rank["shrinks"]) == (4, False)
        (said,) = (text for text in rank["said"] if "compute_loss" in text)
        assert said.startswith("Own has a compute_loss of its own, in which ranks may talk to each other")


@pytest.mark.trap(9)
@pytest.mark.parametrize("how", ["streamed", "after_evaluation"])
def test_two_ranks_give_the_same_gradient_over_an_iterable_data_set_and_after_an_evaluation(how, other_findings):
    torch.manual_seed(0)
    model = EVERY_FAMILY["llama"](dropout=0.0)
    want = token_gradient(model, [Pad()(Samples("llama", 6).rows)])
    for rank in other_findings:
        (got,) = rank[how]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(summary(want)), rtol=1e-3, atol=1e-5)


def test_one_copy_on_two_ranks_is_bitwise_a_plain_trainer(other_findings):
    assert [rank["is_plain"] for rank in other_findings] == [True, True]
