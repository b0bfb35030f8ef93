"""What a training batch may be: repeated on its rows, kept whole where rows belong together, or refused."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, DataCollatorWithFlattening, Trainer

from seqba.trainer import BatchAugmentationTrainer
from seqba.trainer.batch import count_items, is_packed, take_copies
from tiny_models import FAMILIES, batch_for, gradients, mixtral
from trainers import Pad, Samples, Stream, arguments, assert_close, token_gradient, trainer_gradients
from trainers import few_objects_to_collect as few_objects_to_collect

CPU = torch.device("cpu")


class Recorder(nn.Module):
    """A model that notes the rows that it is given in training, under dropout, and learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight, self.drop, self.rows = nn.Parameter(torch.ones(())), nn.Dropout(0.5), []

    def forward(self, input_ids, labels=None):
        if self.training and torch.is_grad_enabled():
            self.rows.append(input_ids[:, 0].tolist())
        logits = self.drop(self.weight * input_ids[:, :1].float())
        return {"loss": (logits - 1).pow(2).mean(), "logits": logits}


class Numbered(torch.utils.data.Dataset):
    """Sample n holds the number n, n % 7 + 1 times."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        if n >= self.count:
            raise IndexError(n)
        ids = torch.full((n % 7 + 1,), n)
        return {"input_ids": ids, "labels": ids}


def pad_numbers(samples):
    batch = Pad()(samples)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def rows_met(folder, data, num_copies, copies_per_pass="auto", **settings):
    """For each update, the sample numbers in each of its passes."""
    model = Recorder()
    args = arguments(
        folder,
        **{"num_train_epochs": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "random", **settings},
    )
    trainer = BatchAugmentationTrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=pad_numbers,
        ba_m=num_copies,
        copies_per_pass=copies_per_pass,
    )
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    return model.rows, trainer


@pytest.mark.trap(22)
@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (Numbered(13), {}),
        (Numbered(13), {"train_sampling_strategy": "group_by_length"}),
        (Numbered(13), {"gradient_accumulation_steps": 2}),
        (Stream(Numbered(13)), {"max_steps": 8}),
    ],
    ids=["shuffled", "grouped by length", "accumulated", "iterable"],
)
def test_every_update_holds_each_of_its_samples_m_times_in_the_order_of_one_copy(data, settings, tmp_path):
    once, plain = rows_met(tmp_path, data, 1, **settings)
    fused, augmented = rows_met(tmp_path, data, 3, **settings)
    assert fused == [rows * 3 for rows in once]  # copy-major
    passes, _ = rows_met(tmp_path, data, 3, 2, **settings)
    assert passes == [rows * copies for rows in once for copies in (2, 1)]
    assert plain.state.global_step == augmented.state.global_step == 8 // settings.get("gradient_accumulation_steps", 1)
    assert plain.state.epoch == augmented.state.epoch


@pytest.mark.trap(24)
@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_each_epoch_has_an_order_of_its_own(sampling, tmp_path):
    rows, _ = rows_met(tmp_path, Numbered(13), 2, train_sampling_strategy=sampling)
    first, second = rows[:4], rows[4:]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))
    assert first != second


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_the_order_follows_the_seed_of_the_data_where_there_is_one(sampling, tmp_path):
    def order(**seeds):
        rows, _ = rows_met(tmp_path, Numbered(13), 2, train_sampling_strategy=sampling, num_train_epochs=1, **seeds)
        return rows

    want = order(seed=1, data_seed=7)
    assert order(seed=2, data_seed=7) == want
    assert order(seed=1, data_seed=8) != want


def test_the_rows_are_those_of_a_plain_trainer(tmp_path):
    model = Recorder()
    args = arguments(tmp_path, num_train_epochs=2, per_device_train_batch_size=4, train_sampling_strategy="random")
    Trainer(model=model, args=args, train_dataset=Numbered(13), data_collator=pad_numbers).train()
    assert rows_met(tmp_path, Numbered(13), 1)[0] == model.rows


# ---- packed rows


def packed_batch(*lengths):
    samples = [{"input_ids": list(range(3, 3 + n))} for n in lengths]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(samples, return_tensors="pt")


def test_packed_rows_are_told_by_their_boundaries_or_their_positions():
    assert is_packed(packed_batch(3, 5))
    assert is_packed({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
    assert is_packed({"position_ids": torch.tensor([[5, 6, 7, 2, 3]])})
    assert not is_packed(batch_for("llama"))
    padding = {"position_ids": torch.tensor([[0, 1, 2, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    assert not is_packed(padding)
    left = {"position_ids": torch.tensor([[1, 1, 0, 1, 2]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    assert not is_packed(left)


def test_items_are_samples_targets_and_targets_of_the_next_token():
    batch = batch_for("llama", 3)
    labels = batch["labels"]
    want = [3, int((labels != -100).sum()), int((labels[:, 1:] != -100).sum())]
    assert count_items(batch, CPU).tolist() == want
    assert count_items(packed_batch(3, 5), CPU).tolist() == [2, 6, 6]  # a sequence's first label is never a target
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert count_items({"input_ids": positions, "position_ids": positions}, CPU).tolist() == [2, 2, 2]
    assert count_items({"input_ids": torch.ones(4, 2), "labels": torch.ones(4)}, CPU).tolist() == [4, 4, 4]
    given = {"input_ids": labels, "labels": labels, "shift_labels": labels.roll(-1, 1)}
    assert count_items(given, CPU).tolist() == [3, want[1], want[1]]


class Flattening(DataCollatorWithFlattening):
    def __call__(self, samples):
        return super().__call__([{"input_ids": sample["input_ids"]} for sample in samples], return_tensors="pt")


@pytest.mark.trap(48)
@pytest.mark.parametrize("boundaries", [False, True])
def test_packed_batches_run_one_copy_a_pass_and_their_gradient_is_that_of_the_sequences(boundaries, tmp_path):
    model, data = FAMILIES["llama"](dropout=0.0, attn_implementation="eager"), Samples("llama", 5)
    want = token_gradient(model, [Pad()(data.rows)])
    for copies_per_pass in ("auto", 1):
        (got,) = trainer_gradients(
            tmp_path,
            model,
            data,
            collator=Flattening(return_flash_attn_kwargs=boundaries),
            settings={"gradient_accumulation_steps": 2},
            ba_m=3,
            copies_per_pass=copies_per_pass,
            allow_identical_copies=True,
        )
        assert_close(got, want)


FUSED_PACKED = r"the batches are packed.*copies_per_pass is 2; set copies_per_pass=1"


@pytest.mark.trap(48)
@pytest.mark.parametrize("boundaries", [False, True])
def test_packed_batches_in_a_fused_pass_are_refused(boundaries, tmp_path):
    with pytest.raises(ValueError, match=FUSED_PACKED):
        trainer_gradients(
            tmp_path,
            FAMILIES["llama"](),
            Samples("llama", 3),
            collator=Flattening(return_flash_attn_kwargs=boundaries),
            ba_m=2,
            copies_per_pass=2,
        )


class FlatteningLater(Flattening):
    """Its first batch holds one sequence, so that nothing shows that rows are packed."""

    def __call__(self, samples):
        alone = not hasattr(self, "has_begun")
        self.has_begun = True
        return super().__call__(samples[:1] if alone else samples)


@pytest.mark.trap(48)
@pytest.mark.parametrize("accumulation", [1, 2])  # packed from the second update on, in the second batch of the first
def test_batches_that_are_packed_later_in_a_run_are_kept_alone_and_refused_too(accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation}

    def made(copies_per_pass):
        return BatchAugmentationTrainer(
            model=FAMILIES["llama"](),
            args=arguments(tmp_path, **settings),
            train_dataset=Samples("llama", 6),
            data_collator=FlatteningLater(),
            ba_m=2,
            copies_per_pass=copies_per_pass,
        )

    trainer = made("auto")
    trainer.train()
    assert trainer.counters.copies_per_pass == 1
    with pytest.raises(ValueError, match=FUSED_PACKED):
        made(2).train()


def test_a_batch_that_cannot_be_repeated_says_what_to_do():
    batch = {"input_ids": torch.ones(2, 3), "patches": torch.ones(7, 4)}
    with pytest.raises(ValueError, match=r"patches.*or run one copy a pass \(copies_per_pass=1\)"):
        take_copies(batch, 2)
    assert take_copies(batch, 1) == batch


# ---- rows that the loss compares


def clip():
    text = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "eos_token_id": 2}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    heads = {"num_attention_heads": 2, "attention_dropout": 0.2}
    return CLIPModel(CLIPConfig(text_config=text | heads, vision_config=vision | heads, projection_dim=8))


class Pairs(torch.utils.data.Dataset):
    """Images with captions of one length, for a contrastive loss."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.captions = torch.randint(3, 61, (count, 6), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, n):
        return {"pixel_values": self.images[n], "input_ids": self.captions[n]}


def pair_up(samples):
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {**batch, "return_loss": True}


@pytest.mark.trap(44)
@pytest.mark.parametrize("rows", [3, 64])  # among many, a sibling changes a row's loss by little
def test_a_contrastive_loss_in_a_fused_pass_is_refused(rows, tmp_path):
    options = {"collator": pair_up, "settings": {"per_device_train_batch_size": rows}}
    with pytest.raises(ValueError, match=r"compares the rows of a batch.*sibling copy.*set copies_per_pass=1"):
        trainer_gradients(tmp_path, clip(), Pairs(rows), ba_m=2, copies_per_pass=2, **options)


@pytest.mark.trap(44)
def test_a_contrastive_loss_runs_one_copy_a_pass_without_siblings(tmp_path):
    model, data = clip(), Pairs(4)
    model.eval()
    model(**pair_up([data[n] for n in range(4)])).loss.backward()
    want = gradients(model)
    model.zero_grad()
    for module in model.modules():  # no dropout, so that the mean over copies is known
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    settings = {"per_device_train_batch_size": 4}
    rows = []  # identical siblings would move the loss by a constant, and no gradient

    def note(module, args, inputs):
        if torch.is_grad_enabled():
            rows.append(len(inputs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    (got,) = trainer_gradients(
        tmp_path, model, data, collator=pair_up, settings=settings, ba_m=3, allow_identical_copies=True
    )
    assert rows[-3:] == [4, 4, 4]  # after the look at the gradient of all rows twice
    assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.trap(44)
def test_in_batch_negatives_of_a_users_own_are_seen_too(tmp_path):
    def in_batch(outputs, labels, num_items_in_batch=None):
        states = F.normalize(outputs.logits.mean(1), dim=-1)
        return F.cross_entropy(states @ states.T / 0.1, torch.arange(len(states)))

    model = FAMILIES["bart"](dropout=0.2)
    with pytest.raises(ValueError, match="compares the rows of a batch with each other"):
        trainer_gradients(
            tmp_path,
            model,
            Samples("bart", 3),
            collator=Pad(model),
            compute_loss_func=in_batch,
            ba_m=2,
            copies_per_pass=2,
        )


def test_label_smoothing_of_an_encoder_decoder_without_decoder_inputs_is_refused(tmp_path):
    settings = {"label_smoothing_factor": 0.1}
    with pytest.raises(ValueError, match=r"no decoder_input_ids; give the collator the model: DataCollatorForSeq2Seq"):
        trainer_gradients(tmp_path, FAMILIES["bart"](), Samples("bart", 3), settings=settings, ba_m=2)


def test_an_auxiliary_loss_keeps_all_copies_in_one_pass(tmp_path):
    data = Samples("llama", 3)
    with pytest.raises(ValueError, match=r"does not divide by num_items_in_batch.*set copies_per_pass=3"):
        trainer_gradients(tmp_path, mixtral(), data, ba_m=3, copies_per_pass=2)
    model = mixtral().eval()
    model(**Pad()(data.rows)).loss.backward()
    want = gradients(model)
    model.zero_grad()
    model.config.attention_dropout = 0.0
    model.model.layers[0].self_attn.attention_dropout = 0.0
    (got,) = trainer_gradients(tmp_path, model, data, ba_m=3, allow_identical_copies=True)
    assert_close(got, want)
