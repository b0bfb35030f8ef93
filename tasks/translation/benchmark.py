"""What the translation task costs, as ratios within one run."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqba.step import TrainStep
from tasks.benchmark import Ratio, compare
from tasks.machine import start_accelerator
from tasks.translation.model import TranslationLoss, build_model, summed_loss


@dataclass(frozen=True)
class BenchmarkConfig:
    """The update that is timed; the defaults are the shape of Multi30k in a small Transformer."""

    ba_m: int = field(default=4, metadata={"help": "M, copies of each sample in an update"})
    copies_per_pass: int = field(default=4, metadata={"help": "copies in one forward and backward pass"})
    num_samples: int = field(default=40, metadata={"help": "B, sentence pairs in a batch"})
    length: int = field(default=24, metadata={"help": "pieces of every sentence, on both sides"})
    vocab_size: int = field(default=8_000, metadata={"help": "pieces in the vocabulary"})
    width: int = field(default=256, metadata={"help": "width of the model, D"})
    num_layers: int = field(default=3, metadata={"help": "layers of the encoder, and of the decoder"})
    pairs: int = field(default=15, metadata={"help": "timed pairs of updates, A B A B"})


def streams_over_plain(config: BenchmarkConfig) -> Ratio:
    """Seconds of an update with per-copy random streams, over one with torch's own dropout."""
    batch = _batch(config)
    return compare(
        _updates(config, batch, copy_seed=0),
        _updates(config, batch, copy_seed=None),
        pairs=config.pairs,
    )


def _updates(config: BenchmarkConfig, batch: dict[str, Tensor], *, copy_seed: int | None) -> Callable[[], object]:
    accelerator = start_accelerator(seed=0)
    model = build_model(
        vocab_size=config.vocab_size,
        width=config.width,
        ffn_width=4 * config.width,
        num_layers=config.num_layers,
        num_heads=4,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        pad_token_id=0,
        eos_token_id=1,
        max_length=config.length,
    )
    loss_model = TranslationLoss(model, 0.1).train()
    wrapped, optimizer = accelerator.prepare(loss_model, torch.optim.Adam(loss_model.parameters(), lr=1e-5))
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=summed_loss,
        num_copies=config.ba_m,
        copies_per_pass=config.copies_per_pass,
        copy_seed=copy_seed,
    )
    on_device = {name: x.to(accelerator.device) for name, x in batch.items()}
    return lambda: float(step([on_device], update=1).loss)  # reading the loss waits for the device


def _batch(config: BenchmarkConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_samples, config.length)
    ids = torch.randint(3, config.vocab_size, shape, generator=generator)
    labels = torch.randint(3, config.vocab_size, shape, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "decoder_input_ids": labels.roll(1, dims=1),
    }
