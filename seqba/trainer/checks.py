"""Checks of the Trainer integration on the first batch, and the errors that give the reason."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from seqba.arguments import BatchAugmentationArguments
from seqba.audit import audit_masks, check_copies_differ
from seqba.audit.state import undisturbed
from seqba.draws.generators import rng_state, set_rng_state
from seqba.errors import UnsupportedError
from seqba.loss import IGNORE_INDEX
from seqba.passes import CopyPlan, is_out_of_memory
from seqba.trainer.batch import UnrepeatableError, is_packed, take_copies, without_packing
from seqba.trainer.loss import ALIKE, SIMILAR, Divisor, LossForm, Rows, compare_rows, measure_loss

logger = logging.getLogger(__name__)

_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


def refuse_unsupported(trainer: Trainer, arguments: BatchAugmentationArguments) -> None:
    """Refuse a trainer whose setting the laws are not known to hold in.

    Raises:
        UnsupportedError: several GPUs in one process, DeepSpeed, FSDP, Megatron-LM, or a batch spread over ranks; ranks
            that share a batch where every rank divides by its own targets, or one rank cuts batches for all.
    """
    if arguments.ranks_per_group > 1:
        if not trainer.args.average_tokens_across_devices:
            raise UnsupportedError(
                f"ranks_per_group={arguments.ranks_per_group} needs one denominator for all ranks; set "
                "average_tokens_across_devices=True"
            )
        if trainer.args.accelerator_config.dispatch_batches or trainer.args.accelerator_config.split_batches:
            raise UnsupportedError(
                f"ranks_per_group={arguments.ranks_per_group} needs whole batches on every rank; leave "
                "dispatch_batches and split_batches out of accelerator_config"
            )
    if trainer.args.n_gpu > 1:
        raise UnsupportedError(
            f"one process sees {trainer.args.n_gpu} GPUs and would spread the rows of a batch over them by "
            "nn.DataParallel; start one process a GPU (accelerate launch, torchrun), or show it one GPU "
            "(CUDA_VISIBLE_DEVICES)"
        )
    accelerator = trainer.accelerator
    if accelerator.distributed_type in _UNSUPPORTED:
        raise UnsupportedError(
            f"Batch Augmentation is not supported under {accelerator.distributed_type.value}, whose gradients are "
            "reduced or stepped where the passes of an update do not reach; use DDP"
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise UnsupportedError(
            "Batch Augmentation is not supported with tensor, context or sequence parallelism; use DDP"
        )


def refuse_missing_decoder_inputs(trainer: Trainer, inputs: Any) -> None:
    """The Trainer's label smoothing takes the labels away, from which encoder-decoders would make these.

    Raises:
        UnsupportedError: they are missing. (BART would silently take the source for them.)
    """
    is_encoder_decoder = getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False)
    given = any(key in inputs for key in ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs"))
    if trainer.label_smoother is not None and is_encoder_decoder and not given:
        raise UnsupportedError(
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} takes the labels away from the model, and "
            "the batch has no decoder_input_ids; give the collator the model: DataCollatorForSeq2Seq(..., model=model)"
        )


def measured(trainer: Trainer, model: nn.Module, inputs: Any, num_items: Any, rows: Rows) -> LossForm | None:
    """The form of the trainer's loss on this batch (`measure_loss`); model and generators are left as they were."""
    with _asked(trainer, model) as asked:
        return measure_loss(
            lambda rows, num_items: asked.loss(rows, num_items).detach().float(),
            asked.shadow,
            inputs,
            num_items,
            rows=rows,
            total=asked.total,
            may_ignore=_may_ignore(model),
            tolerance=asked.tolerance,
        )


def rows_of_loss(trainer: Trainer, model: nn.Module, inputs: Any, num_items: Any) -> Rows:
    """What the trainer's loss does with its rows (`compare_rows`); model and generators are left as they were."""
    with _asked(trainer, model) as asked:
        found: list[list[Tensor | None]] = [[], [], []]  # which say nothing
        try:
            twice, over = take_copies(inputs, 2), None if num_items is None else 2 * num_items
            of_one, redrawn = (asked.gradient(inputs, num_items, other_draws=other) for other in (False, True))
            found = [of_one, redrawn, asked.gradient(twice, over)]
        except UnrepeatableError:
            pass
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        one, under_other_draws, of_twice = found
        return compare_rows(one, under_other_draws, of_twice, total=asked.total, tolerance=asked.tolerance)


class _Asked:
    """A trainer's loss, and its gradient, under the same draws at each call."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self.trainer, self.model, self.start = trainer, trainer.accelerator.unwrap_model(model), rng_state()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.weights)
        self.tolerance = SIMILAR if half or trainer.accelerator.mixed_precision != "no" else ALIKE

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        summed: Tensor = self.trainer.accelerator.reduce(x, "sum")
        return summed

    def loss(self, rows: Any, num_items: Any, *, other_draws: bool = False) -> Tensor:
        """0-dim."""
        if not other_draws:
            set_rng_state(self.start)
        with self.trainer.compute_loss_context_manager():
            loss: Tensor = self.trainer.compute_loss(self.model, take_copies(rows, 1), num_items_in_batch=num_items)
        return loss

    def gradient(self, rows: Any, num_items: Any, *, other_draws: bool = False) -> list[Tensor | None]:
        """The loss, and its gradient to each weight."""
        with torch.enable_grad():
            loss = self.loss(rows, num_items, other_draws=other_draws)
            if loss.grad_fn is None:
                return [loss.detach(), *[None] * len(self.weights)]
            return [loss.detach(), *torch.autograd.grad(loss, self.weights, allow_unused=True)]

    def shadow(self, rows: Any, num_items: Any) -> Tensor:
        """The loss, and its gradient's products with four fixed random directions."""
        loss, *gradient = self.gradient(rows, num_items)
        assert loss is not None
        products = torch.zeros(4, dtype=torch.float64)
        for place, x in enumerate(gradient):
            if x is not None:
                generator = torch.Generator(x.device).manual_seed(place)
                for i in range(len(products)):
                    direction = torch.randn(x.shape, generator=generator, device=x.device)
                    products[i] += float((x.float() * direction).sum())
        return torch.cat([loss.double().view(1), products.to(loss.device)])


@contextmanager
def _asked(trainer: Trainer, model: nn.Module) -> Iterator[_Asked]:
    """The trainer's loss in eval mode."""
    with undisturbed(model), torch.compiler.set_stance("force_eager"):
        model.eval()
        yield _Asked(trainer, model)


def _may_ignore(model: nn.Module) -> list[int]:
    """Labels that a model's loss may pass over: by its settings, and 255 of segmentation."""
    config = getattr(model, "config", None)
    named = [getattr(config, name, None) for name in ("semantic_loss_ignore_index", "ignore_index", "pad_token_id")]
    return [value for value in dict.fromkeys([*named, 255]) if isinstance(value, int) and value != IGNORE_INDEX]


def plan_for(trainer: Trainer, plan: CopyPlan, form: LossForm, packed: bool) -> CopyPlan:
    """The plan, or the only one that this loss and these batches allow.

    Raises:
        UnsupportedError: the plan that was asked for is another one, or no plan is right.
    """
    num_copies = len(plan.copies)
    if num_copies == 1:
        return plan
    alone = _why_alone(form, packed)
    if form.rows is Rows.UNKNOWN and not packed and plan.copies_per_pass > 1 and form.divisor is not Divisor.BOTH:
        unknown = "whether the rows of a batch act on each other in the loss has not shown yet"
        if not plan.is_auto:
            logger.warning("%s, and %d copies stand in a pass, as asked", unknown, plan.copies_per_pass)
            return plan
        return _only(plan, 1, f"{unknown}: one copy stands in a pass until it has")
    together = form.divisor is Divisor.BOTH
    if alone and together:
        raise UnsupportedError(f"{alone}; and {_TOGETHER}: no plan of {num_copies} copies is right for both")
    if alone:
        return _only(plan, 1, f"{alone}: one copy must stand in a pass")
    if together:
        return _only(plan, num_copies, f"{_TOGETHER}: all copies must stand in one pass")
    if (
        plan.is_auto
        and trainer.accelerator.num_processes > 1
        and type(trainer).compute_loss is not Trainer.compute_loss
    ):
        # ranks may talk to each other inside it (TRL's do), which they must not where one of them has failed
        logger.warning(
            "%s has a compute_loss of its own, in which ranks may talk to each other: copies_per_pass=auto stays at %d "
            "and does not halve when memory runs out; set a smaller copies_per_pass there",
            type(trainer).__name__,
            plan.copies_per_pass,
        )
        return CopyPlan(plan.copies, plan.copies_per_pass)
    return plan


_TOGETHER = "a part of the loss does not divide by num_items_in_batch (an auxiliary loss) and is added in every pass"


def _why_alone(form: LossForm, packed: bool) -> str | None:
    if packed:
        return "the batches are packed, several sequences in a row, and their boundaries would not fit repeated rows"
    if form.rows is Rows.SUMMED:
        return "the loss is a sum over the rows of a batch, and would be as many times as large as there are copies"
    if form.rows is Rows.COMPARED:
        return (
            "the loss compares the rows of a batch with each other (in-batch negatives, contrastive), and would take a "
            "sibling copy for another sample"
        )
    return None


def _only(plan: CopyPlan, copies_per_pass: int, reason: str) -> CopyPlan:
    if plan.copies_per_pass != copies_per_pass:
        if not plan.is_auto:
            raise UnsupportedError(
                f"{reason}, but copies_per_pass is {plan.copies_per_pass}; set copies_per_pass={copies_per_pass}"
            )
        logger.warning("%s (copies_per_pass=%d)", reason, copies_per_pass)
    return CopyPlan(plan.copies, copies_per_pass)


def check_copies(trainer: Trainer, model: nn.Module, inputs: Any) -> None:
    """Look whether anything random makes copies of this batch differ; buffers and generators are left as they were.

    Raises:
        IdenticalCopiesError: nothing does.
    """
    rows = without_packing(inputs) if is_packed(inputs) else inputs
    try:
        take_copies(rows, 2)
    except UnrepeatableError as error:
        logger.warning("the copies of a batch could not be compared, as it cannot be repeated: %s", error)
        return

    def forward(network: nn.Module, batch: Any) -> Any:
        with warnings.catch_warnings(), trainer.compute_loss_context_manager():
            warnings.simplefilter("ignore", FutureWarning)  # TRL's, of asking for the outputs
            result = trainer.compute_loss(network, take_copies(batch, 1), return_outputs=True)
        return result[1] if isinstance(result, tuple) else result

    model.train()  # as the Trainer's step does
    unwrapped = trainer.accelerator.unwrap_model(model)
    check_copies_differ(audit_masks(unwrapped, rows, num_copies=2, forward=forward, measure_variance=False))
