"""Batch Augmentation for the Hugging Face Trainer, and for any of its subclasses.

    trainer = BatchAugmentationTrainer(model=model, args=args, train_dataset=ds, data_collator=collator, ba_m=4)

Each training batch stands M times in its update, copy-major, every copy under its own dropout masks. The gradient
of an update is
    sum over ranks, batches, copies of grad nll(w, T_m(x_n), y_n) / (number of their targets),
whatever the model's loss divides by (`seqba.trainer.loss`). Steps, epochs, schedules, evaluation and prediction do
not know M.

Where this is not what a plain Trainer of transformers 5.17 to 5.24 does, already with `ba_m=1`:

- A loss that ignores `num_items_in_batch` (Marian, BART, T5 and most encoder-decoders, BERT's classifiers): the plain
  gradient is the sum of the batches' means, too large by accumulation steps and ranks.
- A loss that is never given it (a forward without `**kwargs`, no `labels`): the plain gradient is the mean of the
  batches' means, in which a target of a small batch weighs more.
- A causal model whose class name the Trainer does not know for one (GPT-2's): its plain count has one target a row
  too many, and the gradient is that much too small.
- An update without any target: the plain loss is nan, here it is 0.
- Several ranks, after `evaluate` or `predict`: accelerate takes the model for prepared and does not wrap it, so that
  under a plain Trainer each rank trains by itself; here they train together.
- Length-grouped sampling: the plain order of later epochs depends on how many numbers dropout drew, here it comes from
  (seed, epoch), so that neither M nor resuming moves it.
- One process on several GPUs without a launcher (`nn.DataParallel`), DeepSpeed, FSDP, Megatron-LM, tensor, context
  and sequence parallelism: refused.

An iterable data set is resumed in its first pass only, as by a plain Trainer, which cannot tell where later ones began.
A plain Trainer's other choices hold: with `average_tokens_across_devices=False` every rank divides by its own targets.
An auxiliary loss beside the token loss (mixtures of experts) is added once for every batch, so it takes fused passes.

A loss that is a mean over what nobody can tell (over sequences, as CTC's), a sum, and one that sets
`loss_is_scaled_for_ga`, is weighed as by the plain Trainer, whatever M is.

The first batch is looked at before it is trained on: `compute_loss` is called on it, on its two parts, with labels that
have changed places, and with M > 1 with each row there twice (again in updates 2 and 10), in eval mode and with
gradients that reach no weight; two of its copies run through the audit. What a `compute_loss` of one's own does beside
(prints, logs) happens then too; the trainer's plain attributes are put back. It is never given a label that the batch
does not hold, and where it fails on a part, the run goes on.
"""

from seqba.arguments import BatchAugmentationArguments as BatchAugmentationArguments
from seqba.trainer.mixin import BatchAugmentationMixin as BatchAugmentationMixin
from seqba.trainer.mixin import BatchAugmentationSeq2SeqTrainer as BatchAugmentationSeq2SeqTrainer
from seqba.trainer.mixin import BatchAugmentationTrainer as BatchAugmentationTrainer
from seqba.trainer.mixin import augment as augment
