"""Train a translation model, M copies of every pair in an update: the loop, top to bottom."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import MarianMTModel

from seqba import schedule
from seqba.loss import count_targets
from seqba.sampler import TokenBatchSampler
from seqba.step import TrainStep, UpdateResult
from tasks.cli.errors import UserError
from tasks.cli.machine import start_accelerator
from tasks.decoding.search import Decoding
from tasks.models.audit import refuse_identical_copies
from tasks.models.transformer import build_model
from tasks.run.checkpoints import SameData
from tasks.run.guards import INTERRUPTED
from tasks.run.loop import Run, set_learning_rate
from tasks.run.progress import Figures
from tasks.run.stream import SAMPLE_IDS, BatchStream
from tasks.scoring.bleu import bleu_tokenizer
from tasks.translation.config import TranslationConfig, TranslationOptions, may_differ, run_folder
from tasks.translation.data import lengths
from tasks.translation.model import TranslationLoss, count_labels, count_parameters, summed_loss
from tasks.translation.prepare import Corpus, Texts, generate_texts, prepare, read_texts
from tasks.translation.result import write_result

logger = logging.getLogger(__name__)

FIGURES = Figures("token", "loss (nats per target token)", "training (with dropout, label smoothing)")

_AUDITED = 4  # samples on which the copies are compared


def train(options: TranslationOptions) -> None:
    """Train from text to a scored model folder.

    Raises:
        UserError: options, data or the run folder cannot be used, and nothing was trained; or a run ended in its midst,
            by a loss that is not finite or a disk that is full: its last good checkpoint is kept.
        SystemExit: the run was stopped by Ctrl-C or SIGTERM, after it was saved.
    """
    for _ in training(options):
        pass


def training(options: TranslationOptions) -> Iterator[tuple[UpdateResult, BatchStream]]:
    """`train`, which hands back control after every update; closed early, it leaves an unfinished run."""
    config, copies = options.config, options.copies
    folder = Path(run_folder(options))
    accelerator = start_accelerator(
        options.machine, seed=options.run.seed, report_to=options.run.report_to, folder=folder
    )
    group = options.group(accelerator)
    run = Run(
        accelerator,
        folder,
        options.run,
        options.as_json(),
        group=group,
        figures=FIGURES,
        may_differ=may_differ(config),
    )

    # ---- data and model
    corpus = load_corpus(config, accelerator)
    stream = make_stream(options, accelerator, corpus)
    model = build(config, corpus, options.run.seed)
    loss_model = TranslationLoss(model, config.label_smoothing)
    optimizer = torch.optim.Adam(loss_model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)
    wrapped, optimizer = accelerator.prepare(loss_model, optimizer)
    if copies.ba_m > 1 and not copies.allow_identical_copies:
        _refuse_identical_copies(loss_model, stream, corpus)
    rate = learning_rate(config, options.run.max_updates)
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=summed_loss,
        count_fn=count_labels,
        num_copies=copies.ba_m,
        copies_per_pass=copies.copies_per_pass,
        ranks_per_group=group.ranks_per_group,
        reduce_every_pass=options.run.reduce_every_pass or None,
        max_norm=options.run.max_norm,
        copy_seed=options.run.seed if copies.reproducible_copies else None,
        noise_every=copies.noise_every,
    )
    _describe(options, accelerator, corpus, stream, model)
    run.start_trackers("translation")
    run.attach(model, optimizer, data=SameData(corpus.fingerprint), stream=stream, step=step)

    # ---- the loop
    for update in run.updates():
        batches = stream.take(options.run.accumulation)
        sample_ids = [n for batch in batches for n in batch.pop(SAMPLE_IDS).tolist()]
        lr = set_learning_rate(optimizer, rate(update))
        result = step(batches, update=update)
        run.record(update, result, sample_ids)
        validation = None
        if run.must_validate:
            validation = {"valid_loss": validation_loss(accelerator, loss_model, corpus, config.max_tokens)}
        run.log(validation, lr=lr)
        run.save_if_due()
        yield result, stream
    if run.interrupted:
        raise SystemExit(INTERRUPTED)

    # ---- the result: the checkpoint with the lowest validation loss, scored once
    run.load_best()
    with run.writing(folder):
        decoding = Decoding(config.num_beams, config.length_penalty)
        languages, made_by = (config.source_lang, config.target_lang), describe_training(options)
        tokenizer = bleu_tokenizer(config.target_lang, config.bleu_tokenize)
        write_result(
            run, corpus, model, decoding, config.max_length, languages=languages, made_by=made_by, tokenizer=tokenizer
        )


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


def read_corpus(config: TranslationConfig) -> Texts:
    """Read or generate the text; a `DataError` says that it cannot be read, or holds no pair."""
    if config.is_generated:
        return generate_texts(config.corpus_seed)
    assert config.valid_prefix is not None
    return read_texts(
        config.train_prefix, config.valid_prefix, config.test_prefix, config.source_lang, config.target_lang
    )


def load_corpus(config: TranslationConfig, accelerator: Accelerator) -> Corpus:
    """Read or generate the text, and encode it; a `DataError` says that nothing is left to train on."""
    return prepare(
        lambda: read_corpus(config),
        accelerator,
        vocab_size=config.vocab_size,
        max_length=config.max_length,
        max_length_ratio=config.max_length_ratio,
        normalization=config.normalization,
        cache_dir=config.cache_dir,
        num_proc=config.num_proc,
    )


def make_stream(options: TranslationOptions, accelerator: Accelerator, corpus: Corpus) -> BatchStream:
    """This rank's batches of the training text, by token budget; a longer pair is a `UserError`."""
    max_tokens, longest = options.config.max_tokens, int(corpus.train_lengths.max())
    if longest > max_tokens:  # pieces are known only now
        raise UserError(
            f"--max-tokens {max_tokens} is too small for a pair of {longest} pieces; raise it, or drop long pairs by a "
            "lower --max-length"
        )
    group, run = options.group(accelerator), options.run
    sampler = TokenBatchSampler(
        corpus.train_lengths,
        max_tokens,
        seed=run.seed,
        num_shards=group.num_groups,
        shard=group.index,
        batches_per_update=run.accumulation,
    )
    return BatchStream(
        corpus.train,
        sampler,
        corpus.collate,
        device=accelerator.device,
        seed=run.seed,
        num_workers=run.num_workers,
        channel=options.channel(accelerator),
    )


def _refuse_identical_copies(loss_model: nn.Module, stream: BatchStream, corpus: Corpus) -> None:
    """M copies cost M times as much: not where they are all the same."""
    batch = corpus.collate(corpus.train.__getitems__(range(min(_AUDITED, len(corpus.train)))))
    batch = {name: x.to(stream.device) for name, x in batch.items()}
    refuse_identical_copies(loss_model, batch, summed_loss, "--dropout 0.1")


def _describe(
    options: TranslationOptions, accelerator: Accelerator, corpus: Corpus, stream: BatchStream, model: MarianMTModel
) -> None:
    """Say what is trained, and what an update sees on average, as "tokens a batch" means many things."""
    num_copies = options.copies.ba_m
    logger.info(
        f"{count_parameters(model):,} parameters, {len(corpus.train):,} training pairs, M = {num_copies}, "
        f"{accelerator.num_processes} process(es), {torch.get_num_threads()} threads on {accelerator.device}"
    )
    updates = len(stream.sampler) / options.run.accumulation  # of an epoch; a rank's batches, several at a time
    source, target = (lengths(corpus.train, side).sum() / updates for side in ("input_ids", "labels"))
    logger.info(
        f"an update has {len(corpus.train) / updates:,.0f} pairs of {source:,.0f} source and {target:,.0f} target "
        f"tokens (mean over all ranks, no padding), each {num_copies} times; {updates:,.0f} updates an epoch"
    )


def describe_training(options: TranslationOptions) -> dict[str, str]:
    """How a model was made, for its card."""
    config, copies = options.config, options.copies
    passes = f"copies per pass {copies.copies_per_pass}, reproducible copies {copies.reproducible_copies}"
    return {
        "copies of each pair in an update, M": f"{copies.ba_m} ({passes})",
        "batch": f"{config.max_tokens:,} padded tokens before repetition, times {options.run.accumulation} a rank",
        "dropout, the random transform T": f"{config.dropout} on embeddings and residual branches, "
        f"{config.attention_dropout} on attention weights, {config.activation_dropout} inside feed-forward layers",
    }


def learning_rate(config: TranslationConfig, max_updates: int) -> Callable[[int], float]:
    """update -> rate: a linear warm-up to lr_scale * (width * warmup)^-0.5, and the decay that was asked for."""
    warmup = config.warmup_updates
    if config.lr_decay == "inverse-sqrt":
        return partial(schedule.transformer, width=config.width, warmup_updates=warmup, scale=config.lr_scale)
    decay = schedule.linear if config.lr_decay == "linear" else schedule.cosine
    peak = config.lr_scale * (config.width * warmup) ** -0.5
    return partial(decay, peak_lr=peak, warmup_updates=warmup, total_updates=max_updates)


def build(config: TranslationConfig, corpus: Corpus, seed: int) -> MarianMTModel:
    """A model with new weights, equal on all ranks; the generators are seeded for the masks afterwards."""
    torch.manual_seed(seed)
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
    set_seed(seed, device_specific=True)  # the weights are equal on all ranks, the masks are not
    if config.gradient_checkpointing:
        # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model
