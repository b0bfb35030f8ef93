"""The gradient law beside what else a training script switches on: precision, checkpointing, compilers, peft, TRL."""

import copy
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from seqba import unfold
from seqba.audit import IdenticalCopiesError
from seqba.draws.streams import copy_streams
from seqba.trainer import BatchAugmentationMixin, BatchAugmentationTrainer
from tiny_models import VOCABULARY, enable_checkpointing, gradients, llama, marian
from trainers import (
    ACCUMULATED,
    IDENTICAL,
    Pad,
    Samples,
    Seen,
    assert_close,
    batches_of,
    token_gradient,
    token_loss,
    trainer_gradients,
)
from trainers import few_objects_to_collect as few_objects_to_collect


def copies_one_by_one(model, batches, num_copies, seed):
    """The gradient of the copies that `reproducible_copies` draws, each run by itself."""
    model.train()
    tokens = num_copies * sum(token_loss(model, batch)[1] for batch in batches)
    for shard, batch in enumerate(batches):
        for m in range(num_copies):
            with copy_streams((m,), seed=seed, update=1, shard=shard):
                (token_loss(model, batch)[0] / tokens).backward()
    want = gradients(model)
    model.zero_grad()
    return want


def distance(got, want):
    """How far a whole gradient is from another, relative to it."""
    difference = torch.stack([(got[name] - want[name]).norm() for name in want]).norm()
    return float(difference / torch.stack([x.norm() for x in want.values()]).norm())


# ---- precision


@pytest.mark.parametrize("family", [marian, llama])
@pytest.mark.parametrize(("num_copies", "copies_per_pass"), [(1, 1), (3, 2), (4, 4)])
def test_under_bfloat16_the_gradient_is_that_of_float32_up_to_rounding(family, num_copies, copies_per_pass, tmp_path):
    model, data = family(dropout=0.0), Samples(family.__name__, 5)
    want = token_gradient(model, batches_of(data))
    options = {"ba_m": num_copies, "copies_per_pass": copies_per_pass, **IDENTICAL}
    (got,) = trainer_gradients(tmp_path, model, data, settings={**ACCUMULATED, "bf16": True}, **options)
    assert 0 < distance(got, want) < 2e-2  # a wrong denominator would be off by a quarter and more


class LossScaling(TrainerCallback):
    """float16's loss scaling, which accelerate has on accelerators only, put in place on the CPU."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.accelerator.native_amp = True  # not before: the model itself stays in float32


@pytest.mark.trap(11)
@pytest.mark.parametrize("copies_per_pass", [1, 2, 4])
def test_under_a_loss_scaler_the_clipped_gradient_is_that_of_float32(copies_per_pass, tmp_path, monkeypatch):
    model, data = llama(dropout=0.0), Samples("llama", 5)
    want = token_gradient(model, batches_of(data))
    norm = float(torch.stack([x.norm() for x in want.values()]).norm())
    assert norm > 0.05
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16" if self.native_amp else "no"))

    def made(**options):
        trainer = BatchAugmentationTrainer(**options)
        trainer.add_callback(LossScaling(trainer.accelerator))
        return trainer

    settings = {**ACCUMULATED, "max_grad_norm": 0.05}
    options = {"ba_m": 4, "copies_per_pass": copies_per_pass, **IDENTICAL}
    (got,) = trainer_gradients(tmp_path, model, data, trainer_class=made, settings=settings, **options)
    assert_close(got, {name: x * 0.05 / norm for name, x in want.items()}, rtol=1e-3)


# ---- checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_gradient_checkpointing_meets_the_same_masks_again(use_reentrant, streams, tmp_path):
    data, found = Samples("marian", 5), []
    torch.manual_seed(0)
    model = marian(0.3)
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        options = {"ba_m": 3, "copies_per_pass": 2, "reproducible_copies": streams}
        found += trainer_gradients(tmp_path, model, data, settings=ACCUMULATED, **options)
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


# ---- peft and NEFTune: other random transforms than the model's own dropout


def with_lora(dropout):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(dropout=0.0), config)


@pytest.mark.trap(34)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_the_dropout_of_lora_is_the_transform(tmp_path):
    model, data = with_lora(0.3), Samples("llama", 5)
    want = copies_one_by_one(model, batches_of(data), 4, seed=42)
    assert all("lora" in name for name in want)
    for copies_per_pass in (1, 3, 4):
        options = {"ba_m": 4, "copies_per_pass": copies_per_pass, "reproducible_copies": True}
        (got,) = trainer_gradients(tmp_path, model, data, settings=ACCUMULATED, **options)
        assert_close(got, want, rtol=1e-3, atol=1e-5)
    with pytest.raises(IdenticalCopiesError):
        trainer_gradients(tmp_path, with_lora(0.0), data, ba_m=4)


@pytest.mark.trap(34)
def test_the_noise_of_neftune_is_the_transform(tmp_path):
    model, data, seen = llama(dropout=0.0), Samples("llama", 3), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found = []
    for copies_per_pass in (4, 3):
        seen.clear()
        options = {"ba_m": 4, "copies_per_pass": copies_per_pass, "reproducible_copies": True}
        found += trainer_gradients(tmp_path, model, data, settings={"neftune_noise_alpha": 5.0}, **options)
        if copies_per_pass == 4:
            copies = unfold(seen[-1], 4)
            for a, b in ((0, 1), (1, 2), (0, 3)):
                assert not torch.allclose(copies[a], copies[b], rtol=1e-3)
    handle.remove()
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    plain = token_gradient(model, batches_of(data))
    assert distance(found[0], plain) > 1e-2  # the noise was there


# ---- compilers


@pytest.fixture
def compiler(monkeypatch) -> Iterator[None]:
    """`torch_compile` of one Trainer would otherwise compile the models that accelerate prepares in later tests."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    yield
    AcceleratorState._reset_state()


class MaskShown(nn.Module):
    """Its output is a dropout mask, scaled."""

    def __init__(self):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.ones(())), nn.Dropout(0.3)

    def forward(self, input_ids, labels=None):
        logits = self.drop(self.weight.expand(len(input_ids), 5_000))
        return {"loss": logits.mean(), "logits": logits}


@pytest.mark.usefixtures("compiler")
@pytest.mark.trap(26)
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_masks_keep_their_rate_and_are_independent_between_copies_compiled_or_not(backend, tmp_path):
    masks = []

    def loss(outputs, labels, num_items_in_batch=None):
        if torch.is_grad_enabled() and bool((outputs["logits"] == 0).any()):  # not in eval mode
            masks.append(outputs["logits"].detach() != 0)
        return outputs["loss"]

    def collate(samples):
        batch = Pad()(samples)
        return {name: batch[name] for name in ("input_ids", "labels")}

    settings = {} if backend is None else {"torch_compile": True, "torch_compile_backend": backend}
    options = {"collator": collate, "compute_loss_func": loss, "settings": settings, "ba_m": 4, "copies_per_pass": 2}
    trainer_gradients(tmp_path, MaskShown(), Samples("llama", 6), **options)
    assert [len(kept) for kept in masks] == [6, 6, 6, 6]  # two updates, two passes of two copies each
    rows = torch.cat(masks).double()
    z = (rows.mean() - 0.7) / (0.7 * 0.3 / rows.numel()) ** 0.5
    assert abs(z) < 5
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max() < 5 / rows.shape[1] ** 0.5


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.trap(26)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_gradient_of_a_compiled_model_is_the_law(backend, tmp_path):
    model, data = llama(dropout=0.0), Samples("llama", 5)
    want = token_gradient(model, batches_of(data))
    settings = {**ACCUMULATED, "torch_compile": True, "torch_compile_backend": backend}
    (got,) = trainer_gradients(tmp_path, model, data, settings=settings, ba_m=3, copies_per_pass=2, **IDENTICAL)
    got = {name.removeprefix("_orig_mod."): x for name, x in got.items()}
    assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("compiler")
@pytest.mark.trap(26)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_reproducible_copies_of_a_compiled_model_are_those_of_the_model(backend, tmp_path):
    data, found = Samples("llama", 5), []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        options = {"settings": {**ACCUMULATED, **compiled}, "ba_m": 3, "reproducible_copies": True}
        for copies_per_pass in (1, 3):
            torch.manual_seed(0)
            found += trainer_gradients(tmp_path, llama(dropout=0.3), data, copies_per_pass=copies_per_pass, **options)
    for got in found[1:]:
        assert_close({name.removeprefix("_orig_mod."): x for name, x in got.items()}, found[0], rtol=1e-3, atol=1e-5)


# ---- TRL


# what TRL and transformers say of each other's defaults
of_trl = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.label_smoothing_factor. is deprecated in .SFTTrainer:FutureWarning",
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
)


class AugmentedSFT(BatchAugmentationMixin, SFTTrainer):
    pass


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, VOCABULARY)}}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="<pad>", eos_token="<eos>")


def sft_gradients(folder, model, data, settings, **options):
    seen = Seen()
    args = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        learning_rate=0.0,
        optim="sgd",
        max_grad_norm=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=3,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        **{"max_length": 16, **settings},
    )
    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data.rows])
    trainer = AugmentedSFT(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer(), callbacks=[seen], **options
    )
    trainer.train()
    return seen.gradients, trainer


@of_trl
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_gradient_of_sft_is_the_law(label_smoothing, tmp_path):
    model, data = llama(dropout=0.0), Samples("llama", 5)
    want = token_gradient(model, batches_of(data), label_smoothing)
    settings = {**ACCUMULATED, "label_smoothing_factor": label_smoothing}
    for num_copies, copies_per_pass in ((1, 1), (3, 2), (4, 4)):
        options = {"ba_m": num_copies, "copies_per_pass": copies_per_pass, **IDENTICAL}
        (got,), trainer = sft_gradients(tmp_path, model, data, settings, **options)
        assert_close(got, want)
        # looking at the first batch is not counted
        tokens = sum(len(row["input_ids"]) for row in data.rows)
        assert trainer._total_train_tokens == num_copies * tokens


@of_trl
@pytest.mark.trap(48)
@pytest.mark.parametrize(
    "how", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packed", "padding-free"]
)
def test_packed_sft_runs_one_copy_a_pass_and_its_gradient_is_that_of_the_sequences(how, tmp_path):
    model, data = llama(dropout=0.0, attn_implementation="eager"), Samples("llama", 9)
    want = token_gradient(model, batches_of(data))
    settings = {"gradient_accumulation_steps": 3, **how}
    (got,), trainer = sft_gradients(tmp_path, model, data, settings, ba_m=3, **IDENTICAL)
    assert_close(got, want)
    assert trainer.counters.copies_per_pass == 1
    assert trainer.counters.unique_samples == 9
    with pytest.raises(ValueError, match=r"the batches are packed.*set copies_per_pass=1"):
        sft_gradients(tmp_path, model, data, settings, ba_m=3, copies_per_pass=3, **IDENTICAL)


@of_trl
@pytest.mark.parametrize("how", [{}, {"packing": True}], ids=["padded", "packed"])
def test_sft_refuses_identical_copies_and_finds_dropout(how, tmp_path):
    data = Samples("llama", 5)
    with pytest.raises(IdenticalCopiesError):
        sft_gradients(tmp_path, llama(dropout=0.0), data, how, ba_m=2)
    found, _ = sft_gradients(tmp_path, llama(dropout=0.3, attn_implementation="eager"), data, how, ba_m=2)
    assert found


class AugmentedDPO(BatchAugmentationMixin, DPOTrainer):
    pass


@of_trl
@pytest.mark.trap(52)
def test_the_gradient_of_dpo_is_that_of_the_plain_trainer(tmp_path):
    """Its batch is chosen answers in front of rejected ones, and its loss begins as log 2 whatever they are."""
    rows = [
        {"prompt": f"w{n + 3} w{n + 4}", "chosen": f" w{n + 5} w{n + 9} w7", "rejected": f" w{n + 8} w{2 * n + 3}"}
        for n in range(4)
    ]

    def found(trainer_class, **options):
        torch.manual_seed(0)
        seen = Seen()
        args = DPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=0.0,
            optim="sgd",
            max_grad_norm=0.0,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            max_length=16,
        )
        model = llama(dropout=0.0)
        trainer = trainer_class(
            model=model,
            ref_model=copy.deepcopy(model),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[seen],
            **options,
        )
        trainer.train()
        return seen.gradients[0], trainer

    want, _ = found(DPOTrainer)
    assert max(float(x.abs().max()) for x in want.values()) > 1e-3
    for ba_m in (1, 2):
        got, trainer = found(AugmentedDPO, ba_m=ba_m, **IDENTICAL)
        assert_close(got, want, rtol=1e-3, atol=1e-5)
        assert trainer.counters.copies_per_pass == 1
    with pytest.raises(ValueError, match="compares the rows of a batch with each other"):
        found(AugmentedDPO, ba_m=2, copies_per_pass=2, **IDENTICAL)
