"""Making a trainer with copies: its options, `augment`, and what is refused before or at the first batch."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback

from seqba.audit import IdenticalCopiesError
from seqba.errors import UnsupportedError
from seqba.trainer import BatchAugmentationArguments, BatchAugmentationMixin, BatchAugmentationTrainer, augment
from tiny_models import FAMILIES, gpt2, gradients, llama, marian
from trainers import Pad, Samples, arguments, assert_close, make, trainer_gradients
from trainers import few_objects_to_collect as few_objects_to_collect

# ---- copies that differ


@pytest.mark.trap(34)
def test_copies_that_would_be_identical_are_refused_with_the_table(tmp_path):
    with pytest.raises(IdenticalCopiesError, match="allow_identical_copies"):
        trainer_gradients(tmp_path, llama(0.0), Samples("llama", 3), ba_m=2)
    trainer_gradients(tmp_path, llama(0.0), Samples("llama", 3), ba_m=1)
    trainer_gradients(tmp_path, llama(0.0), Samples("llama", 3), ba_m=2, allow_identical_copies=True)


@pytest.mark.trap(34)
def test_copies_are_looked_at_in_the_modes_that_the_step_trains_them_in(tmp_path):
    model, batch = llama(0.3), Pad()(Samples("llama", 3).rows)
    trainer = make(tmp_path, model, ba_m=2)
    for module in model.modules():
        module.training = module is model  # the Trainer's step switches all of it on
    assert trainer.training_step(model, batch) > 0


@pytest.mark.trap(3)
def test_copies_that_share_all_their_draws_are_warned_of_by_name(tmp_path):
    model = marian(0.0, encoder_layerdrop=0.5)
    with pytest.warns(UserWarning, match=r"shared by the copies.*LayerDrop in model\.encoder"):
        trainer_gradients(tmp_path, model, Samples("marian", 3), ba_m=2)


@pytest.mark.parametrize("family", ["marian", "llama"])
@pytest.mark.parametrize("copies_per_pass", [1, 3])
def test_looking_at_the_first_batch_moves_no_generator_and_no_gradient(family, copies_per_pass, tmp_path):
    model, data = FAMILIES[family](0.3), Samples(family, 3)
    trainer = make(tmp_path, model, data, ba_m=3, copies_per_pass=copies_per_pass)
    batch = Pad()([data[n] for n in range(3)])
    steps = []
    for _ in range(2):  # the first looks, the second knows
        torch.manual_seed(7)
        model.zero_grad()
        loss = trainer.training_step(model, batch)
        steps.append((loss, gradients(model), torch.get_rng_state()))
    (loss, got, state), (loss_known, want, state_known) = steps
    assert torch.equal(loss, loss_known)
    assert torch.equal(state, state_known)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_looking_at_a_model_that_is_random_in_eval_mode_too_moves_no_generator(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.drawn = nn.Parameter(torch.ones(())), []

        def forward(self, input_ids, labels=None):
            noise = torch.rand(input_ids.shape)
            self.drawn.append(noise)
            return {"loss": (self.weight * noise).mean(), "logits": self.weight * noise}

    model, batch = Noisy(), {name: torch.ones(3, 2, dtype=torch.long) for name in ("input_ids", "labels")}
    trainer = make(tmp_path, model, ba_m=2)
    torch.manual_seed(7)
    trainer.training_step(model, batch)
    torch.manual_seed(7)
    for noise in model.drawn[-2:]:  # one copy a pass, as nobody can see what this loss does with its rows
        assert torch.equal(noise, torch.rand(3, 2))


# ---- making one


def test_augment_does_to_an_object_what_the_class_does(tmp_path):
    model, data = gpt2(0.3), Samples("gpt2", 5)
    settings = {"gradient_accumulation_steps": 2}
    (want,) = trainer_gradients(tmp_path, model, data, settings=settings, ba_m=3, copies_per_pass=2)

    class Mine(Trainer):
        pass

    def made(**options):
        trainer = Mine(**options)
        assert augment(trainer, ba_m=3, copies_per_pass=2) is trainer
        assert isinstance(trainer, Mine)
        return trainer

    (got,) = trainer_gradients(tmp_path, model, data, settings=settings, trainer_class=made)
    assert_close(got, want)
    with pytest.raises(TypeError, match="has Batch Augmentation already"):
        augment(augment(make(tmp_path, model, trainer_class=Trainer), 2), 2)


def test_the_options_parse_from_the_command_line():
    parser = HfArgumentParser(BatchAugmentationArguments)
    argv = ["--ba-m", "4", "--copies-per-pass", "2", "--reproducible-copies", "--allow-identical-copies"]
    (parsed,) = parser.parse_args_into_dataclasses(argv)
    assert parsed == BatchAugmentationArguments(4, 2, True, True)
    (default,) = parser.parse_args_into_dataclasses([])
    assert default == BatchAugmentationArguments(1, "auto", False, False)


def test_the_options_reach_the_trainer_in_one_object_or_one_by_one(tmp_path):
    one = make(tmp_path, llama(), ba_args=BatchAugmentationArguments(ba_m=4, copies_per_pass=2))
    other = make(tmp_path, llama(), ba_m=4, copies_per_pass=2)
    assert one.ba_args == other.ba_args
    assert make(tmp_path, llama()).ba_args.ba_m == 1
    with pytest.raises(ValueError, match="ba_args holds ba_m already"):
        make(tmp_path, llama(), ba_m=2, ba_args=BatchAugmentationArguments(ba_m=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ba_m": 0}, "ba_m must be a whole number of at least 1, got 0"),
        ({"ba_m": True}, "ba_m must be a whole number of at least 1, got True"),
        ({"ba_m": 4, "copies_per_pass": 5}, "auto or from 1 to ba_m 4, got 5"),
        ({"ba_m": 4, "copies_per_pass": 0}, "auto or from 1 to ba_m 4, got 0"),
        ({"ba_m": 4, "copies_per_pass": "some"}, "copies_per_pass must be auto or from 1 to ba_m 4, got some"),
    ],
)
def test_wrong_options_name_the_value_and_the_limit(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, llama(), **options)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        augment(Trainer(model=llama(), args=args), 2)


@pytest.mark.parametrize(
    ("kind", "dimensions", "message"),
    [
        (DistributedType.DEEPSPEED, 1, "not supported under DEEPSPEED"),
        (DistributedType.FSDP, 1, "not supported under FSDP"),
        (DistributedType.MEGATRON_LM, 1, "not supported under MEGATRON_LM"),
        (DistributedType.MULTI_GPU, 2, "not supported with tensor, context or sequence parallelism"),
    ],
)
def test_ranks_that_share_a_model_or_a_batch_are_refused(kind, dimensions, message, tmp_path):
    trainer = Trainer(model=llama(), args=arguments(tmp_path))
    trainer.accelerator = SimpleNamespace(
        distributed_type=kind, parallelism_config=SimpleNamespace(non_data_parallel_size=dimensions)
    )
    with pytest.raises(UnsupportedError, match=message):
        augment(trainer, 2)
    assert type(trainer) is Trainer


def test_get_batch_samples_overridden_without_super_is_an_error_with_accumulation(tmp_path):
    class Own(BatchAugmentationMixin, Trainer):
        pass

    class Top(Own):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)

    settings = {"gradient_accumulation_steps": 2}
    with pytest.raises(RuntimeError, match="get_batch_samples was overridden without"):
        make(tmp_path, llama(0.3), trainer_class=Top, ba_m=2, settings=settings).train()


class Counting(TrainerCallback):
    """Holds what its trainer's loss holds: a list that both fill."""

    def __init__(self, records):
        self.records = records


@pytest.mark.parametrize("num_copies", [1, 2])
def test_what_a_trainer_shares_with_others_stays_shared(num_copies, tmp_path):
    """Attributes are put back after the first batch was looked at, in the objects that others hold."""

    class Records(BatchAugmentationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.records, self.sums = [], {"losses": [0]}
            self.add_callback(Counting(self.records))

        def compute_loss(self, *args, **kwargs):
            self.records.append(self.state.global_step)
            self.sums["losses"][0] += 1
            return super().compute_loss(*args, **kwargs)

    trainer = make(tmp_path, llama(0.3), trainer_class=Records, ba_m=num_copies)
    sums = trainer.sums
    trainer.train()
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Counting))
    assert trainer.records == callback.records == [0, 1, 2]  # three updates of one fused pass each
    assert sums is trainer.sums
    assert sums == {"losses": [3]}


def test_a_refused_trainer_is_still_the_plain_one(tmp_path):
    trainer = make(tmp_path, llama(0.3), trainer_class=Trainer)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        augment(trainer, ba_m=2)
    trainer.args._n_gpu = 1
    assert type(trainer) is Trainer
    trainer.train()
