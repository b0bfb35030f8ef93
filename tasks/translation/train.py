"""Train a translation model, M copies of every pair in an update: the loop, top to bottom."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import MarianMTModel

from seqba import schedule
from seqba.audit import IdenticalCopiesError, audit_masks, check_copies_differ
from seqba.loss import count_targets
from seqba.sampler import TokenBatchSampler
from seqba.step import TrainStep, UpdateResult
from tasks.cli.errors import UserError, identical_copies
from tasks.cli.machine import start_accelerator
from tasks.models.transformer import build_model
from tasks.run.checkpoints import SameData
from tasks.run.guards import INTERRUPTED
from tasks.run.loop import Cadence, Run, set_learning_rate
from tasks.run.stream import SAMPLE_IDS, BatchStream
from tasks.translation.config import TranslationConfig, as_json, may_differ
from tasks.translation.model import TranslationLoss, count_labels, count_parameters, summed_loss
from tasks.translation.prepare import Corpus, prepare
from tasks.translation.result import write_result

_AUDITED = 4  # samples on which the copies are compared


def train(config: TranslationConfig) -> None:
    """Run `config` from text to a scored model folder.

    Raises:
        UserError: options, data or the run folder cannot be used, and nothing was trained; or a run ended in its midst,
            by a loss that is not finite or a disk that is full: its last good checkpoint is kept.
        SystemExit: the run was stopped by Ctrl-C or SIGTERM, after it was saved.
    """
    for _ in training(config):
        pass


def training(config: TranslationConfig) -> Iterator[tuple[UpdateResult, BatchStream]]:
    """`train`, which hands back control after every update; closed early, it leaves an unfinished run."""
    folder = Path(config.folder)
    accelerator = start_accelerator(
        seed=config.seed,
        mixed_precision=config.mixed_precision,
        report_to=config.report_to,
        folder=folder,
        cpu=config.cpu,
    )
    run = Run(
        accelerator,
        folder,
        as_json(config),
        Cadence(config.max_updates, config.log_every, config.eval_every, config.save_every, config.keep_checkpoints),
        num_copies=config.ba_m,
        max_norm=config.max_norm,
        resume=config.resume,
        may_differ=may_differ(config),
    )

    # ---- data and model
    corpus = prepare(config, accelerator, say=run.say)
    stream = make_stream(config, accelerator, corpus)
    model = build(config, corpus)
    loss_model = TranslationLoss(model, config.label_smoothing)
    optimizer = torch.optim.Adam(loss_model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)
    wrapped, optimizer = accelerator.prepare(loss_model, optimizer)
    if config.ba_m > 1 and not config.allow_identical_copies:
        _refuse_identical_copies(loss_model, stream, corpus)
    rate = learning_rate(config)
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=summed_loss,
        count_fn=count_labels,
        num_copies=config.ba_m,
        copies_per_pass="auto" if config.copies_per_pass == "auto" else int(config.copies_per_pass),
        max_norm=config.max_norm,
        copy_seed=config.seed if config.reproducible_copies else None,
    )
    run.say(
        f"{count_parameters(model):,} parameters, {len(corpus.train):,} training pairs, M = {config.ba_m}, "
        f"{accelerator.num_processes} process(es), {torch.get_num_threads()} threads on {accelerator.device}"
    )
    run.say(_describe_update(config, corpus, stream))
    with run.writing(folder):
        accelerator.init_trackers("translation", config=None)
    run.attach(model, optimizer, data=SameData(corpus.fingerprint), stream=stream, step=step)

    # ---- the loop
    for update in run.updates():
        batches = stream.take(config.accumulation)
        sample_ids = [n for batch in batches for n in batch.pop(SAMPLE_IDS).tolist()]
        lr = set_learning_rate(optimizer, rate(update))
        result = step(batches, update=update)
        run.record(update, result, sample_ids)
        valid_loss = None
        if run.is_due(config.eval_every):
            valid_loss = validation_loss(accelerator, loss_model, corpus, config.max_tokens)
        run.log(lr=lr, valid_loss=valid_loss)
        run.save_if_due()
        yield result, stream
    if run.interrupted:
        raise SystemExit(INTERRUPTED)

    # ---- the result: the checkpoint with the lowest validation loss, scored once
    run.load_best()
    with run.writing(folder):
        write_result(config, run, corpus, model)


@torch.no_grad()
def validation_loss(accelerator: Accelerator, loss_model: nn.Module, corpus: Corpus, max_tokens: int) -> float:
    """Nats per target token over the validation text: every pair once, no dropout, no smoothing, no copies."""
    loss_model.eval()
    longest = int(corpus.valid_lengths.max())
    batches = list(TokenBatchSampler(corpus.valid_lengths, max(max_tokens, longest)))
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = corpus.collate(corpus.valid.__getitems__(indices))
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        with accelerator.autocast():
            totals[0] += loss_model(batch).double()
        totals[1] += count_targets(batch["labels"])
    loss_model.train()
    nll, targets = accelerator.reduce(totals, "sum").tolist()
    return nll / targets


def make_stream(config: TranslationConfig, accelerator: Accelerator, corpus: Corpus) -> BatchStream:
    """This rank's batches of the training text, by token budget.

    Raises:
        UserError: a pair is longer than the budget.
    """
    try:
        sampler = TokenBatchSampler(
            corpus.train_lengths,
            config.max_tokens,
            seed=config.seed,
            num_shards=accelerator.num_processes,
            shard=accelerator.process_index,
            batches_per_update=config.accumulation,
        )
    except ValueError as error:  # a pair longer than the budget; pieces are known only now
        raise UserError(
            f"--max-tokens {config.max_tokens} is too small for a pair of {int(corpus.train_lengths.max())} pieces; "
            "raise it, or drop long pairs by a lower --max-length"
        ) from error
    return BatchStream(
        corpus.train,
        sampler,
        corpus.collate,
        device=accelerator.device,
        seed=config.seed,
        num_workers=config.num_workers,
    )


def _refuse_identical_copies(loss_model: nn.Module, stream: BatchStream, corpus: Corpus) -> None:
    """M copies cost M times as much: not where they are all the same."""
    batch = corpus.collate(corpus.train.__getitems__(range(min(_AUDITED, len(corpus.train)))))
    batch = {name: x.to(stream.device) for name, x in batch.items()}
    audit = audit_masks(loss_model, batch, forward=summed_loss, measure_variance=False)
    try:
        check_copies_differ(audit)
    except IdenticalCopiesError as error:
        raise identical_copies(error, "--dropout 0.1") from error


def _describe_update(config: TranslationConfig, corpus: Corpus, stream: BatchStream) -> str:
    """What an update sees on average, as "tokens a batch" means many things."""
    updates = len(stream.sampler) / config.accumulation  # of an epoch; a rank's batches, several at a time
    source, target = (total / updates for total in corpus.train.num_tokens)
    return (
        f"an update has {len(corpus.train) / updates:,.0f} pairs of {source:,.0f} source and {target:,.0f} target "
        f"tokens (mean over all ranks, no padding), each {config.ba_m} times; "
        f"{updates:,.0f} updates an epoch"
    )


def learning_rate(config: TranslationConfig) -> Callable[[int], float]:
    """update -> rate: a linear warm-up to lr_scale * (width * warmup)^-0.5, and the decay that was asked for."""
    warmup, total = config.warmup_updates, config.max_updates
    if config.lr_decay == "inverse-sqrt":
        return partial(schedule.transformer, width=config.width, warmup_updates=warmup, scale=config.lr_scale)
    decay = schedule.linear if config.lr_decay == "linear" else schedule.cosine
    peak = config.lr_scale * (config.width * warmup) ** -0.5
    return partial(decay, peak_lr=peak, warmup_updates=warmup, total_updates=total)


def build(config: TranslationConfig, corpus: Corpus) -> MarianMTModel:
    """A model with new weights, equal on all ranks; the generators are seeded for the masks afterwards."""
    torch.manual_seed(config.seed)
    model = build_model(
        vocab_size=len(corpus.tokenizer),
        width=config.width,
        ffn_width=config.ffn_width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        pad_token_id=corpus.tokenizer.pad_token_id,
        eos_token_id=corpus.tokenizer.eos_token_id,
        max_length=config.max_length,
    )
    set_seed(config.seed, device_specific=True)  # the weights are equal on all ranks, the masks are not
    if config.gradient_checkpointing:
        # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model
