"""The mixin that repeats training batches inside the step of any Trainer, and what it makes of transformers' own."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from seqba.analysis.live import PassNorms, noise_of_halves, pick_rows
from seqba.arguments import BatchAugmentationArguments as BatchAugmentationArguments
from seqba.arguments import choose_arguments
from seqba.groups import CopyGroup
from seqba.passes import CopiesPerPass, CopyPlan, Pass, PassLoop
from seqba.trainer.batch import (
    SAMPLES,
    TARGETS,
    UnrepeatableError,
    UpdateItems,
    count_items,
    is_packed,
    take_copies,
    transformed,
)
from seqba.trainer.checks import (
    check_copies,
    measured,
    plan_for,
    refuse_missing_decoder_inputs,
    refuse_unsupported,
    rows_of_loss,
)
from seqba.trainer.counters import BatchAugmentationCounters
from seqba.trainer.loss import Divisor, LossForm, Rows, part_of_update
from seqba.trainer.state import OrderOfEpoch, batches_by_group, replaced, snapshot, wrap_again

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

_TRIED = 16  # copies, before T is said to make none differ: two of them are equal by chance


@dataclass
class _Run:
    """Facts that a call of `train` finds out while it runs."""

    loop: PassLoop
    asked: CopyPlan
    batch_size: int
    form: LossForm | None = None
    packed: bool = False
    has_audited: bool = False
    items: UpdateItems | None = None
    updates: int = 0
    noises: dict[str, list[Tensor]] = field(default_factory=dict)  # since the last line of the log

    @property
    def looks_at_rows(self) -> bool:
        """Whether to look at what the loss does with its rows: at updates 1, 2 and 10, and until it has shown."""
        unknown = self.form is not None and self.form.rows is Rows.UNKNOWN
        return self.updates in (0, 1, 9) or (unknown and self.updates + 1 in (100, 1_000, 10_000))


class BatchAugmentationMixin(_TrainerBase):
    """Repeats every training batch of a Trainer M times inside the step, with one denominator for all copies.

    It goes in front of a Trainer class: `class MySFT(BatchAugmentationMixin, SFTTrainer)`. An overridden `compute_loss`
    is called once a pass, with the rows of that pass; so is a `training_step` of the class behind it. A `training_step`
    of a class that inherits from this one is called once a batch, and must call `super().training_step`.

    Args:
        *args, **kwargs: the Trainer's own.
        ba_m: M, by default 1.
        copies_per_pass: K from 1 to M, or "auto" (default): start with all M in one pass, and halve on out-of-memory
            (not on several ranks with an overridden `compute_loss`, where that cannot be done safely: a warning).
        reproducible_copies: copy m of an update draws from its own stream of (seed, update, batch, m), so that
            the masks are the same under every plan (`seqba.copy_streams`).
        allow_identical_copies: train even where nothing random makes the copies of a sample differ.
        ranks_per_group: R, by default 1; so many consecutive ranks meet the same batches, and each computes M / R of
            their copies (Hoffer et al. 2020, section 4.5).
        noise_every: log `noise_between`, the gradient's noise between samples, as measured in every such update, and
            `noise_within`, that of T, also in every fourth where copies run in several passes
            (`seqba.analysis`); of the first rank's first batch. 0, the default, measures nothing.
        ba_args: all six in one object, instead of them.
        transform: T on the images of training batches, on the device: a `seqba.transforms.BatchTransform`, which
            `EachImage` makes of a transform of torchvision's. Each copy of an image has its own draws, a function of
            (seed, update, shard, sample, copy): neither plans nor a resume change them. None by default.

    Raises:
        ValueError: an option out of range.
        UnsupportedError: an option that this Trainer's setting cannot keep; when training, packed rows or rows that the
            loss compares with each other (in-batch negatives) in a fused pass that was asked for, and a loss that is a
            sum over its rows.
        IdenticalCopiesError: when training, copies that would all be identical.
        StreamError: when training with reproducible copies, a draw that cannot be told apart by copy.
    """

    def __init__(
        self,
        *args: Any,
        ba_m: int | None = None,
        copies_per_pass: CopiesPerPass | None = None,
        reproducible_copies: bool | None = None,
        allow_identical_copies: bool | None = None,
        ranks_per_group: int | None = None,
        noise_every: int | None = None,
        ba_args: BatchAugmentationArguments | None = None,
        transform: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = choose_arguments(
            ba_args,
            ba_m=ba_m,
            copies_per_pass=copies_per_pass,
            reproducible_copies=reproducible_copies,
            allow_identical_copies=allow_identical_copies,
            ranks_per_group=ranks_per_group,
            noise_every=noise_every,
        )
        super().__init__(*args, **kwargs)
        refuse_unsupported(self, arguments)
        self._ba_setup(arguments, transform)

    @property
    def counters(self) -> BatchAugmentationCounters:
        """Samples met, instances seen, targets, of the whole run; without its callback a resumed run counts anew."""
        callbacks = self.callback_handler.callbacks  # a resumed run has one of its own
        return next((c for c in callbacks if isinstance(c, BatchAugmentationCounters)), self._ba_counters)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; what an earlier call found out about model and loss is found out again."""
        self._ba_run = self._ba_new_run()
        wrap_again(self)
        result = super().train(*args, **kwargs)
        self._ba_check_passes()
        return result

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The batches of an update, as the Trainer's, with their samples and targets counted.

        None where a checkpoint is resumed that has done all updates: the Trainer would do one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._ba_check_passes()
        if batches:
            self._ba_run.items = self._ba_count(batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward over all copies of a batch: the Trainer's own step in each pass of the plan."""
        inputs = self._prepare_input(inputs)
        items = self._ba_items_of(inputs)  # may begin a new run, where the batch size has changed
        run = self._ba_run
        batch, of = items.done, len(items.batches)
        items.done += 1
        self._ba_look_at(model, inputs, num_items_in_batch)
        items = self._ba_run.items or items  # counted anew, where the look has found what a target is

        update = self.state.global_step + 1

        def run_pass(one: Pass, inputs: Any) -> Tensor:
            rows = self._ba_copies(inputs, one.copies, (self.args.seed, update, one.shard))
            with self._ba_weighted_loss(batch, len(one.copies)):
                return self._ba_pass(model, rows, num_items_in_batch)

        def loss_of(model: nn.Module, one: Pass, inputs: Any) -> Tensor:
            rows = self._ba_copies(inputs, one.copies, (self.args.seed, update, one.shard))
            model.train()  # as the Trainer's step does
            with self._ba_weighted_loss(batch, len(one.copies)), self.compute_loss_context_manager():
                return self.compute_loss(model, rows, num_items_in_batch=self._ba_num_items(num_items_in_batch))

        if batch == 0 and self.ba_args.noise_every:
            self._ba_watch(model, inputs, update)
        options = {"update": update, "first": batch, "of": of, "try_first": items.try_first}
        try:
            loss = run.loop.run(model, [inputs], run_pass, loss_of, **options)
        except UnrepeatableError as error:  # before anything was done
            if not run.asked.is_auto:
                raise
            logger.warning("%s: from here on one copy stands in a pass", error)
            run.asked = run.loop.plan = CopyPlan(run.asked.copies, 1)
            run.loop.measures = False
            loss = run.loop.run(model, [inputs], run_pass, loss_of, **options)
        if batch == 0 and run.loop.norms is not None:
            self._ba_note(noise_within=run.loop.norms.within(int(items.batches[0][SAMPLES]), self._ba_factor(items)))
        if items.done == of:
            self._ba_finish(items)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; lines about training also say what was met and seen, the last one with copies how fast."""
        if "learning_rate" in logs or "train_runtime" in logs:
            seconds = logs.get("train_runtime") if self.ba_args.ba_m > 1 else None
            logs.update(self.counters.logs(seconds))
            noises, self._ba_run.noises = self._ba_run.noises, {}
            logs.update({name: float(torch.stack(values).nanmean()) for name, values in noises.items()})
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; ranks of a group read the same batches."""
        with batches_by_group(self._ba_run.loop.group):
            loader: DataLoader = super().get_train_dataloader()
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; orders grouped by length are made independent of what dropout draws."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return OrderOfEpoch(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    # ---- an update

    def _ba_setup(self, arguments: BatchAugmentationArguments, transform: Callable[..., Tensor] | None) -> None:
        self.ba_args, self._ba_transform = arguments, transform
        self._ba_run = self._ba_new_run()
        self._ba_counters = BatchAugmentationCounters()
        self.add_callback(self._ba_counters)

    def _ba_new_run(self) -> _Run:
        group = CopyGroup.of(self.accelerator, self.ba_args.ba_m, self.ba_args.ranks_per_group)
        seed = self.args.seed if self.ba_args.reproducible_copies else None
        plan = CopyPlan(group.copies, self.ba_args.copies_per_pass)
        # ranks start from one seed: without streams, their copies would meet the same masks
        rank_seed = self.args.seed if self.accelerator.num_processes > 1 and self.ba_args.ba_m > 1 else None
        carried = [lambda: snapshot(self)]
        loop = PassLoop(self.accelerator, plan, group, copy_seed=seed, rank_seed=rank_seed, carried=carried)
        return _Run(loop, plan, self._train_batch_size)

    def _ba_count(self, batches: Sequence[Mapping[str, Any]]) -> UpdateItems:
        run, device = self._ba_run, self.args.device
        if run.batch_size != self._train_batch_size:  # `auto_find_batch_size` begins anew with smaller batches
            self._ba_run = run = self._ba_new_run()
        if run.form is None and self.counters.copies_per_pass:  # of the checkpoint that is resumed
            run.loop.plan.load_state_dict({"copies_per_pass": self.counters.copies_per_pass})
        ignored = None if run.form is None else run.form.ignored
        counts = [count_items(batch, device, ignored) for batch in batches]
        source = batches if run.form is None else ()
        total = torch.stack(counts).sum(0)
        repeats = self.ba_args.ba_m > 1
        packed = repeats and any(is_packed(batch) for batch in batches)
        if self.accelerator.num_processes == 1:
            return UpdateItems(counts, total, total, packed=packed, source=source)
        flags = torch.tensor([run.loop.must_try(batches), packed], device=device)
        counted = total * int(run.loop.group.counts_samples)  # a group's batch once
        met = self.accelerator.reduce(torch.cat([counted, flags.to(total)]), "sum")
        larger, packed = (flag > 0 for flag in met[3:].tolist()) if repeats else (False, False)
        everywhere = self.args.average_tokens_across_devices
        return UpdateItems(counts, met[:3] if everywhere else total, met[:3], larger, packed, source=source)

    def _ba_items_of(self, inputs: Any) -> UpdateItems:
        """The update that a batch belongs to: one of its own where the step is called outside of `train`."""
        items = self._ba_run.items
        if items is None or items.done == len(items.batches):
            if getattr(self, "current_gradient_accumulation_steps", 1) > 1:
                raise RuntimeError("get_batch_samples was overridden without calling super().get_batch_samples")
            items = self._ba_run.items = self._ba_count([inputs])
        return items

    def _ba_look_at(self, model: nn.Module, inputs: Any, num_items: Any) -> None:
        """Find the loss's form on the first batch, choose the plan by it, and refuse copies that would be identical."""
        run, items = self._ba_run, self._ba_run.items
        assert items is not None
        is_first, is_packed_now = run.form is None, items.packed and not run.packed
        looks = self.ba_args.ba_m > 1 and run.looks_at_rows and items.done == 1
        run.packed = run.packed or items.packed
        put_back = snapshot(self) if is_first or is_packed_now or looks else lambda: None
        if is_first:
            refuse_missing_decoder_inputs(self, inputs)
        before = run.form
        if is_first or looks:
            asks = self.ba_args.ba_m > 1 and not run.packed and run.asked.copies_per_pass > 1
            rows = rows_of_loss(self, model, inputs, num_items) if asks else Rows.UNKNOWN
            if is_first:
                run.form = measured(self, model, inputs, num_items, rows)
            elif run.form is not None and rows is not Rows.UNKNOWN:
                run.form = replace(run.form, rows=rows)
        if run.form is not None and (run.form != before or is_packed_now):
            run.loop.plan = plan_for(self, run.asked, run.form, run.packed)
            run.loop.measures = run.loop.measures and not run.packed and run.form.rows is not Rows.COMPARED
            run.loop.compares = run.form.divisor is not Divisor.BOTH
            if run.form.ignored is not None and items.source:
                run.items = replace(self._ba_count(items.source), done=items.done)
        if self.ba_args.ba_m > 1 and not run.has_audited and not self.ba_args.allow_identical_copies:
            if not self._ba_parts_copies(inputs):
                check_copies(self, model, inputs)
            run.has_audited = True
        put_back()

    def _ba_check_passes(self) -> None:
        """Refuse to go on where a `training_step` did not do the passes of its batches."""
        items = self._ba_run.items
        if items is not None and items.done < len(items.batches):
            raise RuntimeError(
                f"{items.done} of {len(items.batches)} batches of an update went through the training_step that "
                f"repeats them; {type(self).__name__}.training_step must call super().training_step for each of them"
            )

    def _ba_finish(self, items: UpdateItems) -> None:
        self._ba_run.updates += 1
        self.counters.add(items.met[SAMPLES], items.met[self._ba_target], self.ba_args.ba_m)
        self.counters.copies_per_pass = self._ba_run.loop.plan.copies_per_pass

    def _ba_watch(self, model: nn.Module, inputs: Any, update: int) -> None:
        """Look at the gradients of the coming passes, and where it is due at those of two halves of their batch."""
        run, bare = self._ba_run, self.accelerator.unwrap_model(model)
        if run.loop.norms is None:
            run.loop.norms = PassNorms(model)
        run.loop.norms.begin(update)
        count = len(next(iter(inputs.values())))
        if update % self.ba_args.noise_every or run.packed or count < 2:
            return
        scale, put_back = self._ba_scale, snapshot(self)

        def loss_of(copy: int, numbers: Tensor) -> Tensor:
            rows = pick_rows(self._ba_copies(inputs, (copy,), (self.args.seed, update, 0)), numbers)
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(bare, rows, num_items_in_batch=None)
            return loss * scale

        seed = (self.args.seed, update, self.accelerator.process_index)
        within, between = noise_of_halves(bare, loss_of, count, copies=run.loop.group.pair, seed=seed, scale=scale)
        put_back()
        by_pass = run.loop.norms.is_on and len(run.loop.plan.passes) > 1
        self._ba_note(noise_between=between, noise_within=None if by_pass else within)

    def _ba_note(self, **noises: Tensor | None) -> None:
        for name, value in noises.items():
            if value is not None:
                self._ba_run.noises.setdefault(name, []).append(value.detach())

    def _ba_factor(self, items: UpdateItems) -> Tensor | float:
        """What the first batch's mean loss under one copy was multiplied by."""
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if self._ba_as_plain:
            return self._ba_scale / len(self._ba_run.loop.plan.copies) / len(items.batches)
        targets, everywhere = items.batches[0][self._ba_target], items.all[self._ba_target]
        return self._ba_scale * ranks * targets / (self.ba_args.ba_m * everywhere)

    @property
    def _ba_scale(self) -> float:
        """Of losses, under fp16."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    @property
    def _ba_target(self) -> int:
        """What the loss counts as a target; labels, until a batch that has some has told, and where none did."""
        form = self._ba_run.form
        return TARGETS if form is None or form.target is None else form.target

    # ---- a pass

    def _ba_copies(self, inputs: Any, copies: tuple[int, ...], key: tuple[int, ...]) -> Any:
        """The rows of a pass, under T."""
        rows = take_copies(inputs, len(copies))
        if self._ba_transform is None:
            return rows
        name = getattr(self.accelerator.unwrap_model(self.model), "main_input_name", "pixel_values")
        return transformed(rows, name, self._ba_transform, copies, key)

    def _ba_parts_copies(self, inputs: Any) -> bool:
        """Whether T makes two copies of a batch differ."""
        if self._ba_transform is None:
            return False
        views = (self._ba_copies(inputs, (copy,), (self.args.seed, 0, 0)) for copy in range(_TRIED))
        first = next(views)
        return any(not torch.equal(x, view[name]) for view in views for name, x in first.items() if torch.is_tensor(x))

    def _ba_pass(self, model: nn.Module, rows: Any, num_items: Any) -> Tensor:
        """The Trainer's step on the rows of a pass."""
        return super().training_step(model, rows, self._ba_num_items(num_items))

    def _ba_num_items(self, num_items: Any) -> Any:
        """The targets of all copies, where the loss divides by them."""
        form = self._ba_run.form
        if self._ba_as_plain:
            return num_items
        if num_items is None or form is None or form.divisor is Divisor.PASS:
            return None
        assert self._ba_run.items is not None
        targets = self._ba_run.items.all[self._ba_target]
        return self.ba_args.ba_m * targets.clamp(min=1)

    @contextmanager
    def _ba_weighted_loss(self, batch: int, num_copies: int) -> Iterator[None]:
        """Inside, `compute_loss` gives a pass's part of the update's mean, and the Trainer divides it no further.

        It stands in front of whatever `compute_loss` the trainer has, overridden above this class or below it.
        """
        form, items = self._ba_run.form, self._ba_run.items
        if form is not None and form.divisor is Divisor.BOTH:
            yield
            return
        assert items is not None
        here = num_copies * items.batches[batch][self._ba_target]
        everywhere = self.ba_args.ba_m * items.all[self._ba_target]
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        compute_loss, as_plain = self.compute_loss, self._ba_as_plain
        share = num_copies / len(self._ba_run.loop.plan.copies)  # of this rank's; ranks average

        def part(loss: Tensor) -> Tensor:
            if form is not None and form.divisor is Divisor.UPDATE:
                return loss
            if as_plain:
                return loss if share == 1 else loss * share
            return part_of_update(loss, here, everywhere, ranks)

        def weighted(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            return (part(result[0]), *result[1:]) if isinstance(result, tuple) else part(result)

        with ExitStack() as stack:
            stack.enter_context(replaced(self, "compute_loss", weighted))
            if not (as_plain and hasattr(self, "current_gradient_accumulation_steps")):
                stack.enter_context(replaced(self, "current_gradient_accumulation_steps", 1))
            yield

    @property
    def _ba_as_plain(self) -> bool:
        """Whether batches are weighed as by the plain Trainer: nobody knows better, or the loss says it is scaled."""
        form = self._ba_run.form
        return (
            form is not None
            and form.divisor is Divisor.PASS
            and (form.target is None or getattr(self, "loss_is_scaled_for_ga", False) is True)
        )


class BatchAugmentationTrainer(BatchAugmentationMixin, Trainer):
    """`transformers.Trainer` whose training batches stand M times in their update; see `BatchAugmentationMixin`."""


class BatchAugmentationSeq2SeqTrainer(BatchAugmentationMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` whose training batches stand M times; see `BatchAugmentationMixin`."""


def augment(
    trainer: Trainer,
    ba_m: int | None = None,
    *,
    copies_per_pass: CopiesPerPass | None = None,
    reproducible_copies: bool | None = None,
    allow_identical_copies: bool | None = None,
    ranks_per_group: int | None = None,
    noise_every: int | None = None,
    ba_args: BatchAugmentationArguments | None = None,
    transform: Callable[..., Tensor] | None = None,
) -> Trainer:
    """Give a trainer that somebody else's code made Batch Augmentation: `BatchAugmentationMixin` in front of its class.

    Args:
        trainer: not yet training.
        ba_m, copies_per_pass, reproducible_copies, allow_identical_copies, ranks_per_group, noise_every, ba_args,
            transform: as of
            `BatchAugmentationMixin`.

    Returns:
        The same object, changed.

    Raises:
        TypeError: the trainer has Batch Augmentation already.
        ValueError, UnsupportedError: as `BatchAugmentationMixin`.
    """
    if isinstance(trainer, BatchAugmentationMixin):
        raise TypeError(f"{type(trainer).__name__} has Batch Augmentation already, with {trainer.ba_args}")
    arguments = choose_arguments(
        ba_args,
        ba_m=ba_m,
        copies_per_pass=copies_per_pass,
        reproducible_copies=reproducible_copies,
        allow_identical_copies=allow_identical_copies,
        ranks_per_group=ranks_per_group,
        noise_every=noise_every,
    )
    refuse_unsupported(trainer, arguments)
    plain = type(trainer)
    trainer.__class__ = type(f"BatchAugmentation{plain.__name__}", (BatchAugmentationMixin, plain), {})
    trainer._ba_setup(arguments, transform)
    return trainer
