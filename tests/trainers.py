"""Trainers over tiny models, the gradients that reach their optimizer, and what these should be."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from seqba.trainer import BatchAugmentationTrainer
from tiny_models import OTHER_ENCODER_DECODERS, SEQ2SEQ, VOCABULARY, gradients

IDENTICAL: dict[str, Any] = {"allow_identical_copies": True}  # without dropout, so that copies are known
ACCUMULATED: dict[str, Any] = {"gradient_accumulation_steps": 2}
PLANS = [(1, 1), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 4)]  # (M, K)
QUICK_PLANS = [(1, 1), (3, 2), (4, 4)]


class Samples(Dataset):
    """Unpadded samples of unequal lengths: sample n has 4 + n % 5 tokens, and 2 + n % 4 targets where they differ."""

    def __init__(self, family: str, count: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for n in range(count):
            input_ids = torch.randint(3, VOCABULARY, (4 + n % 5,), generator=generator)
            labels = (
                torch.randint(3, VOCABULARY, (2 + n % 4,), generator=generator) if family in ENCODER_DECODERS else None
            )
            self.rows.append({"input_ids": input_ids, "labels": input_ids.clone() if labels is None else labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return dict(self.rows[n])


class Stream(IterableDataset):
    """The same samples without a length or a number of their own."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.data[n] for n in range(len(self.data)))


ENCODER_DECODERS = {*SEQ2SEQ, *OTHER_ENCODER_DECODERS}


class Pad:
    """Pads samples to a batch; with the model of an encoder-decoder, makes its decoder's inputs too."""

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self.model = model

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        def pad(name: str, value: int) -> Tensor:
            rows = [sample[name] for sample in samples]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        if self.model is not None:
            start = torch.full_like(batch["labels"][:, :1], self.model.config.decoder_start_token_id)
            shifted = torch.cat([start, batch["labels"][:, :-1]], dim=1)
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == -100, self.model.config.pad_token_id)
        return batch


def collator_of(family: str, model: PreTrainedModel, label_smoothing: float) -> Pad:
    """Label smoothing takes the labels away, so the decoder's inputs must be in the batch; FSMT always wants them."""
    return Pad(model if family == "fsmt" or (label_smoothing and family in ENCODER_DECODERS) else None)


def summary(gradient: dict[str, Tensor]) -> list[float]:
    """Of every tensor the sum, the norm, and the product with one random direction."""
    found = []
    for n, x in enumerate(gradient.values()):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(n))
        found += [float(x.double().sum()), float(x.norm()), float((x * direction).sum())]
    return found


class Seen(TrainerCallback):
    """Keeps the gradient of every optimizer step, and the names of the events."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append(gradients(model))


def arguments(folder: Any, **more: Any) -> TrainingArguments:
    """An epoch in order on the CPU, at a learning rate of 0, with nothing clipped, logged or saved."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 0.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**{**settings, **more})


def batches_of(data: Any, size: int = 3, collate: Any = None) -> list[dict[str, Tensor]]:
    """The batches of a data set in its own order."""
    rows = [data[n] for n in range(len(data))]
    return [(collate or Pad())(rows[i : i + size]) for i in range(0, len(rows), size)]


def trainer_gradients(
    folder: Any,
    model: nn.Module,
    data: Any,
    *,
    trainer_class: Callable[..., Any] = BatchAugmentationTrainer,
    collator: Any = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """The gradient of every update that a trainer makes; `options` go to the trainer, `settings` to its arguments."""
    seen = Seen()
    args = arguments(folder, **(settings or {}))
    trainer = trainer_class(
        model=model, args=args, train_dataset=data, data_collator=collator or Pad(), callbacks=[seen], **options
    )
    trainer.train()
    return seen.gradients


def check_plans(
    folder: Any,
    model: nn.Module,
    data: Any,
    want: dict[str, Tensor],
    *,
    plans: Sequence[tuple[int, int]] = QUICK_PLANS,
    **options: Any,
) -> None:
    """The one update of an epoch has the gradient `want` under every plan (M, K)."""
    for num_copies, copies_per_pass in plans:
        (got,) = trainer_gradients(
            folder, model, data, ba_m=num_copies, copies_per_pass=copies_per_pass, **IDENTICAL, **options
        )
        assert_close(got, want)


def token_loss(model: PreTrainedModel, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Summed nats by torch's own function, and the targets that they are over."""
    logits, labels = model(**batch, use_cache=False).logits, batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum", label_smoothing=label_smoothing
    )
    return loss, int((labels != -100).sum())


def token_gradient(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """The gradient of the summed token loss of all batches over all their targets."""
    model.zero_grad()
    losses, counts = zip(*(token_loss(model, batch, label_smoothing) for batch in batches), strict=True)
    (sum(losses) / sum(counts)).backward()
    want = gradients(model)
    model.zero_grad()
    return want


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], *, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Gradients agree to float tolerance, parameter by parameter."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def make(
    folder: Any,
    model: nn.Module,
    data: Any = None,
    *,
    trainer_class: Callable[..., Any] = BatchAugmentationTrainer,
    callbacks: Iterable[TrainerCallback] = (),
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer with 7 samples to train on and 10 to evaluate."""
    return trainer_class(
        model=model,
        args=arguments(folder, **(settings or {})),
        train_dataset=data if data is not None else Samples("llama", 7),
        eval_dataset=Samples("llama", 10, seed=1),
        callbacks=list(callbacks),
        **{"data_collator": Pad(), **options},
    )


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> Iterator[None]:
    """A Trainer collects garbage whenever training starts; what is imported need not be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
