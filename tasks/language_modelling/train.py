"""Train an AWD-LSTM, M copies of every window in an update: the loop, top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from seqba.carried import CarriedState
from seqba.loss import IGNORE_INDEX
from seqba.step import TrainStep, UpdateResult
from tasks.cli.machine import start_accelerator
from tasks.cli.software import describe_machine
from tasks.language_modelling.averaging import NonMonotonicASGD, NonMonotonicTrigger
from tasks.language_modelling.config import MAY_DIFFER_HERE, LanguageModelConfig, LanguageModelOptions, run_folder
from tasks.language_modelling.loss import CarriedLoss, LanguageModelLoss, count_labels
from tasks.language_modelling.model import AwdLstmConfig, AwdLstmForCausalLM
from tasks.language_modelling.prepare import Corpus, Ids, load_corpus
from tasks.language_modelling.windows import Streams, WindowSampler
from tasks.models.audit import refuse_identical_copies
from tasks.models.folder import save_model_folder
from tasks.run.checkpoints import SameData
from tasks.run.guards import INTERRUPTED
from tasks.run.loop import Run, set_learning_rate
from tasks.run.progress import Figures
from tasks.run.stream import SAMPLE_IDS, BatchStream

logger = logging.getLogger(__name__)

FIGURES = Figures("token", "loss (nats per target token)", "training (with dropout, AR and TAR)")

_AUDITED = 4  # streams on which the copies are compared
_EVALUATED = 4_096  # tokens of a pass
_USAGE = """
import tasks.language_modelling  # registers the model with transformers; run it in a checkout of seqba
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
batch = tokenizer(["..."], return_tensors="pt", return_token_type_ids=False)
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=20)))
"""


def train(options: LanguageModelOptions) -> None:
    """Train from text to a model folder with its test perplexity.

    Raises:
        UserError: options, data or the run folder cannot be used, and nothing was trained; or a run ended in its midst,
            by a loss that is not finite or a disk that is full: its last good checkpoint is kept.
        SystemExit: the run was stopped by Ctrl-C or SIGTERM, after it was saved.
    """
    for _ in training(options):
        pass


def training(options: LanguageModelOptions) -> Iterator[tuple[UpdateResult, BatchStream]]:
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
        may_differ=MAY_DIFFER_HERE,
    )

    # ---- data and model
    corpus = load_corpus(config.data, corpus_seed=config.corpus_seed, vocab_size=config.vocab_size)
    stream = make_stream(options, accelerator, corpus)
    model = build(config, corpus, options.run.seed)
    loss_model = LanguageModelLoss(model, alpha=config.alpha, beta=config.beta)
    asgd = NonMonotonicASGD(loss_model.parameters(), config.learning_rate, config.weight_decay)
    wrapped, optimizer = accelerator.prepare(loss_model, asgd)
    if copies.ba_m > 1 and not copies.allow_identical_copies:
        streams = Streams(corpus.train, min(_AUDITED, config.batch_size))
        window = streams.collate(streams.__getitems__(list(range(min(16, streams.length)))))
        window = {name: x.to(accelerator.device) for name, x in window.items()}
        refuse_identical_copies(loss_model, window, lambda model, rows: model(rows)[0], "--output-dropout 0.4")
    carried = CarriedState(model.model.initial_state)
    trigger = NonMonotonicTrigger(config.nonmono)
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=CarriedLoss(carried),
        count_fn=count_labels,
        num_copies=copies.ba_m,
        copies_per_pass=copies.copies_per_pass,
        ranks_per_group=group.ranks_per_group,
        reduce_every_pass=options.run.reduce_every_pass or None,
        max_norm=options.run.max_norm,
        copy_seed=options.run.seed if copies.reproducible_copies else None,
        noise_every=copies.noise_every,
        carried=[carried],
    )
    _describe(options, accelerator, corpus, stream)
    run.start_trackers("language-modelling")
    data = SameData(corpus.fingerprint)
    run.attach(model, optimizer, carried={"hidden": carried}, data=data, stream=stream, step=step, trigger=trigger)

    # ---- the loop
    for update in run.updates():
        batches = stream.take(options.run.accumulation)
        if stream.position == len(batches):  # an epoch begins
            carried.reset()
        sample_ids = [n for batch in batches for n in batch.pop(SAMPLE_IDS).tolist()]
        length = batches[0]["labels"].shape[1]
        lr = set_learning_rate(optimizer, config.learning_rate * length / config.bptt)
        result = step(batches, update=update)
        run.record(update, result, sample_ids)
        validation = None
        if run.must_validate:
            with asgd.averaged_weights():
                validation = evaluate(accelerator, loss_model, corpus.valid, config.valid_batch_size, "valid")
            if trigger.fires(validation["valid_loss"]) and not asgd.averages:
                asgd.begin_averaging()
                logger.info("the weights are averaged from update %d on", update + 1)
        run.log(validation, lr=lr, averages=asgd.averages)
        run.save_if_due()
        yield result, stream
    if run.interrupted:
        raise SystemExit(INTERRUPTED)

    # ---- the result: the checkpoint with the lowest validation loss, its averaged weights, scored once
    run.load_best()
    best = run.progress.best_update or run.progress.update
    made_by = {
        "data": corpus.description,
        "parameters": f"{model.num_parameters():,}",
        "updates": f"{best:,} (the checkpoint with the lowest validation loss)",
        **describe_training(options),
        **describe_machine(run.accelerator),
    }
    if asgd.averages:
        made_by["weights"] = "averaged by NT-ASGD"
    with asgd.averaged_weights(), run.writing(folder):
        test = evaluate(accelerator, loss_model, corpus.test, 1, "test")
        if accelerator.is_main_process:
            save_model_folder(
                folder / "model",
                model,
                corpus.tokenizer,
                title="A word-level AWD-LSTM language model",
                languages=(),
                pipeline="text-generation",
                made_by=made_by,
                scores=[
                    f"perplexity {test['test_perplexity']:.2f}, {test['test_loss']:.4f} nats per token: "
                    f"{len(corpus.test):,} tokens, <eos> counted, in one stream with carried state"
                ],
                usage=_USAGE,
            )
    run.finish({**test, "averages": asgd.averages})
    logger.info(f"test: {test['test_loss']:.4f} nats per token, perplexity {test['test_perplexity']:.2f}")
    logger.info(f"{run.folder}: model/, curve.png, results.json, metrics.jsonl")


def make_stream(options: LanguageModelOptions, accelerator: Accelerator, corpus: Corpus) -> BatchStream:
    """This rank's windows of the training text; a text too short for its streams is a `DataError`."""
    config, run = options.config, options.run
    group = options.group(accelerator)
    streams = Streams(corpus.train, config.batch_size, group.num_groups * run.accumulation)
    sampler = WindowSampler(
        streams.length,
        config.bptt,
        seed=run.seed,
        num_shards=group.num_groups,
        shard=group.index,
        batches_per_update=run.accumulation,
    )
    return BatchStream(
        streams,
        sampler,
        streams.collate,
        device=accelerator.device,
        seed=run.seed,
        num_workers=run.num_workers,
        channel=options.channel(accelerator),
    )


def build(config: LanguageModelConfig, corpus: Corpus, seed: int) -> AwdLstmForCausalLM:
    """A model with new weights, equal on all ranks; the generators are seeded for the masks afterwards."""
    torch.manual_seed(seed)
    model = AwdLstmForCausalLM(
        AwdLstmConfig(
            vocab_size=len(corpus.tokenizer),
            embedding_size=config.embedding_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            input_dropout=config.input_dropout,
            hidden_dropout=config.hidden_dropout,
            output_dropout=config.output_dropout,
            embedding_dropout=config.embedding_dropout,
            weight_dropout=config.weight_dropout,
            mask_scope=config.mask_scope,
            bos_token_id=corpus.tokenizer.eos_token_id,
            eos_token_id=corpus.tokenizer.eos_token_id,
        )
    )
    set_seed(seed, device_specific=True)  # the weights are equal on all ranks, the masks are not
    return model


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, loss_model: LanguageModelLoss, ids: Ids, num_streams: int, split: str
) -> dict[str, float]:
    """Nats per token and perplexity of a text, without dropout: every token once, in streams with carried states.

    A stream begins with a zero state behind the token before it, the first one behind <eos>.
    """
    loss_model.eval()
    width = -(-len(ids) // num_streams)
    end = loss_model.model.config.eos_token_id
    labels = np.full(width * num_streams, IGNORE_INDEX, np.int64)
    labels[: len(ids)] = ids
    input_ids = np.full_like(labels, end)
    input_ids[1 : len(ids)] = ids[:-1]
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    rows = {"input_ids": input_ids, "labels": labels}
    batch = {
        name: torch.from_numpy(x).view(num_streams, width)[mine].to(accelerator.device) for name, x in rows.items()
    }
    loss, state = torch.zeros((), dtype=torch.float64, device=accelerator.device), None
    length = max(1, _EVALUATED // num_streams)
    for start in range(0, width, length) if len(batch["labels"]) else ():
        window = {name: x[:, start : start + length] for name, x in batch.items()}
        with accelerator.autocast():
            nll, state = loss_model(window, state)
        loss += nll.double()
    loss_model.train()
    mean = float(accelerator.reduce(loss, "sum")) / len(ids)
    return {f"{split}_loss": mean, f"{split}_perplexity": math.exp(min(mean, 700))}


def _describe(options: LanguageModelOptions, accelerator: Accelerator, corpus: Corpus, stream: BatchStream) -> None:
    """Say what is trained, and what an update sees."""
    config, accumulation, num_copies = options.config, options.run.accumulation, options.copies.ba_m
    streams = config.batch_size * options.group(accelerator).num_groups * accumulation
    updates = len(stream.sampler) // accumulation
    logger.info(
        f"M = {num_copies}, {accelerator.num_processes} process(es), {torch.get_num_threads()} threads on "
        f"{accelerator.device}"
    )
    logger.info(
        f"an update has {streams:,} windows of {len(corpus.train) / streams / updates:.1f} tokens (mean), each "
        f"{num_copies} times; about {updates:,} updates an epoch; {len(corpus.train) % streams} tokens at the end of "
        "the text fill no stream"
    )


def describe_training(options: LanguageModelOptions) -> dict[str, str]:
    """How a model was made, for its card."""
    config, copies = options.config, options.copies
    passes = f"copies per pass {copies.copies_per_pass}, reproducible copies {copies.reproducible_copies}"
    return {
        "copies of each window in an update, M": f"{copies.ba_m} ({passes})",
        "batch": f"{config.batch_size} streams before repetition, times {options.run.accumulation} a rank; windows of "
        f"about {config.bptt} tokens",
        "dropout, the random transform T": f"input {config.input_dropout}, hidden {config.hidden_dropout}, output "
        f"{config.output_dropout}, words {config.embedding_dropout}, recurrent weights {config.weight_dropout}; the "
        f"last two {config.mask_scope}",
    }
