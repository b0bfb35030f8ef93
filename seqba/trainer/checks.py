"""What the Trainer integration finds out on the first batch, and what it refuses, with the reason."""

import logging
import warnings
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from seqba.audit import audit_masks, check_copies_differ
from seqba.audit.state import is_compiled, undisturbed
from seqba.draws.generators import rng_state, set_rng_state
from seqba.errors import UnsupportedError
from seqba.passes import CopyPlan
from seqba.trainer.batch import is_packed, take_copies, without_packing
from seqba.trainer.loss import Divisor, LossForm, Rows, measure_loss

logger = logging.getLogger(__name__)

_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


def refuse_unsupported(trainer: Trainer, reproducible_copies: bool) -> None:
    """Refuse a trainer whose setting the laws are not known to hold in.

    Raises:
        UnsupportedError: several GPUs in one process, DeepSpeed, FSDP, Megatron-LM, a batch spread over ranks, or
            per-copy streams under a compiler, which draws its random numbers out of their reach.
    """
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
    if reproducible_copies and (trainer.args.torch_compile or any(map(is_compiled, trainer.model.modules()))):
        raise UnsupportedError(
            "reproducible_copies needs to see every random operation, and a compiled model draws inside its kernels; "
            "train without torch_compile or without reproducible_copies"
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


def measured(trainer: Trainer, model: nn.Module, inputs: Any, num_items: Any, *, may_repeat: bool) -> LossForm | None:
    """The form of the trainer's loss on this batch (`measure_loss`); model and generators are left as they were."""
    start = rng_state()

    def loss_of(rows: Any, num_items: Any, *, other_draws: bool = False) -> Tensor:
        if not other_draws:
            set_rng_state(start)
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, take_copies(rows, 1), num_items_in_batch=num_items)
        return loss.detach().float()

    def total(x: Tensor) -> Tensor:
        summed: Tensor = trainer.accelerator.reduce(x, "sum")
        return summed

    with undisturbed(model), torch.compiler.set_stance("force_eager"):
        model.eval()
        return measure_loss(loss_of, inputs, num_items, may_repeat=may_repeat, total=total)


def plan_for(trainer: Trainer, plan: CopyPlan, form: LossForm, packed: bool) -> CopyPlan:
    """The plan, or the only one that this loss and these batches allow.

    Raises:
        UnsupportedError: the plan that was asked for is another one, or no plan is right.
    """
    num_copies = len(plan.copies)
    if num_copies == 1:
        return plan
    if form.rows is Rows.SUMMED:
        raise UnsupportedError(
            f"the loss is a sum over the rows of a batch, so {num_copies} copies would make the gradient {num_copies} "
            "times as large; return the mean over the rows, or divide the sum by num_items_in_batch"
        )
    alone = _why_alone(form, packed)
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
    except (TypeError, ValueError) as error:
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
