"""A resumed run keeps every option that reaches its weights: all but those that are written out here are compared."""

import copy
import json
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.cli.errors import RunError
from tasks.finetuning.config import parse_finetuning
from tasks.finetuning.resume import check_same_options, keep_options, prepare_folder
from tasks.language_modelling import config as language
from tasks.run.folder import RunFolder
from tasks.translation import config as translation
from tasks.vision import config as vision

EVERY_SCRIPT = {
    "resume", "output_dir", "report_to", "num_workers", "num_threads", "max_updates", "keep_checkpoints",
    "allow_identical_copies", "ranks_per_group", "group_broadcast", "rank_timeout", "log_every", "save_every",
    "noise_every",
}  # fmt: skip
SCRIPTS: dict[str, Any] = {
    "translation": (
        translation.parse_config([]),
        translation.may_differ(translation.TranslationConfig()),
        {"cache_dir", "data_dir", "train_prefix", "valid_prefix", "test_prefix", "num_proc", "num_beams",
         "length_penalty", "bleu_tokenize"},
    ),
    "language modelling": (language.parse_config([]), language.MAY_DIFFER_HERE, {"data", "valid_batch_size"}),
    "vision": (
        vision.parse_config([]),
        vision.may_differ(vision.parse_config([]).config),
        {"data", "eval_batch_size", "on_corrupt"},
    ),
}  # fmt: skip


@pytest.mark.trap(62)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_that_is_not_on_the_list_is_refused_on_a_resume(script, tmp_path):
    options, may_differ, own = SCRIPTS[script]
    config = options.as_json()
    RunFolder(tmp_path, config, resume=False, may_differ=may_differ).begin(0)
    for name in config:
        again = RunFolder(tmp_path, config | {name: "another"}, resume=True, may_differ=may_differ)
        if name in EVERY_SCRIPT | own:
            again.open()
        else:
            with pytest.raises(RunError, match=f"another configuration: {name} was .*, is 'another'. Give"):
                again.open()


FINETUNING_MAY_DIFFER = {
    "num_beams", "length_penalty", "bleu_tokenize", "cache_dir", "copies_per_pass", "allow_identical_copies"
}  # fmt: skip
# of these, whatever the version has
OF_TRANSFORMERS = {
    "seed", "data_seed", "full_determinism", "bf16", "fp16", "tf32", "torch_compile", "use_liger_kernel",
    "per_device_train_batch_size", "auto_find_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "ignore_data_skip",
    "accelerator_config", "remove_unused_columns", "label_names", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha",
    "average_tokens_across_devices",
}  # fmt: skip


@pytest.mark.trap(62)
def test_every_option_of_finetuning_that_is_not_on_the_list_is_refused_on_a_resume(tmp_path):
    parts: Any = parse_finetuning(["--output_dir", str(tmp_path), "--use_cpu", "true"])
    keep_options(*parts)
    checkpoint = str(tmp_path / "checkpoint-2")
    check_same_options(checkpoint, *parts)
    kept = json.loads((tmp_path / "options.json").read_text())
    refused = {}
    for number, part in enumerate(parts):
        for name in (field.name for field in fields(part)):
            changed = list(parts)
            changed[number] = copy.copy(part)
            object.__setattr__(changed[number], name, "another")  # neither frozen nor checked
            try:
                check_same_options(checkpoint, *changed)
            except RunError as error:
                refused[name] = str(error)
    own = {field.name for part in parts[:2] for field in fields(part)}
    assert own - refused.keys() == FINETUNING_MAY_DIFFER
    assert refused.keys() >= {name for name in OF_TRANSFORMERS if hasattr(parts[2], name)}
    assert all(f"(--{name} {kept[name]} there and another here)" in said for name, said in refused.items())
    assert not refused.keys() & {"logging_steps", "save_steps", "eval_steps", "report_to", "dataloader_num_workers"}


def test_the_last_checkpoint_is_the_one_of_the_highest_update(tmp_path):
    for update in (90, 900, 1_000):
        folder = tmp_path / f"checkpoint-{update}"
        folder.mkdir()
        for name in ("trainer_state.json", "optimizer.pt"):
            (folder / name).touch()
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint="last")
    assert prepare_folder(args) == str(tmp_path / "checkpoint-1000")
