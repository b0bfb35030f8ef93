"""scripts/finetune.py: what ends a run, what is kept of it, and what continues it."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from finetuning_runs import call_with, data, finetune, models
from tasks.finetuning.callbacks import StopAtSignal
from tasks.run.guards import INTERRUPTED


def test_a_resumed_run_is_the_undisturbed_one(models, data, finetune, tmp_path):
    common = ["--model", models / "gpt2", "--dataset", data / "texts", "--ba_m", 2, "--reproducible_copies", "true"]
    finetune(*common, out="whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    assert "already holds a run (checkpoint-2)" in finetune(*common, out="parts").error
    resumed = finetune(*common, "--resume_from_checkpoint", "last", out="parts")
    assert resumed.status == 0, resumed.error
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    before = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert not all(torch.equal(whole[key], before[key]) for key in whole)


def test_the_newest_checkpoint_that_is_whole_is_gone_on_from(models, data, finetune, tmp_path):
    common = ["--model", models / "gpt2", "--dataset", data / "texts"]
    finetune(*common)
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()  # killed while it was saved
    verdict = finetune(*common, "--resume_from_checkpoint", "last")
    assert "3 is no whole checkpoint of a Trainer (it has no trainer_state.json): passed over" in verdict.stdout
    assert verdict.status == 0, verdict.error
    weights = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    verdict = finetune(*common, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-3")
    assert "checkpoint-3 is damaged (model.safetensors:" in verdict.error


def test_ctrl_c_saves_and_the_same_command_with_last_continues_to_the_same_weights(
    models, data, finetune, tmp_path, monkeypatch
):
    common = ["--model", models / "gpt2", "--dataset", data / "texts", "--resume_from_checkpoint", "last"]
    verdict = finetune(*common)  # nothing to go on from: it starts
    assert verdict.status == 0, verdict.error
    want = load_file(tmp_path / "run" / "model.safetensors")
    shutil.rmtree(tmp_path / "run")
    whole = StopAtSignal.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        whole(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopAtSignal, "on_step_end", interrupted)
        verdict = finetune(*common)
    assert verdict.status == INTERRUPTED
    assert "stopped after update 2" in verdict.stdout
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    verdict = finetune(*common)
    assert verdict.status == 0, verdict.error
    got = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_model_files_follow_the_umask(umask, models, data, finetune, tmp_path):
    before = os.umask(umask)
    try:
        verdict = finetune("--model", models / "gpt2", "--dataset", data / "texts")
    finally:
        os.umask(before)
    assert verdict.status == 0, verdict.error
    files = list((tmp_path / "run").rglob("*.safetensors"))
    assert len(files) >= 2  # the model, and a checkpoint's
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(models, data, finetune, tmp_path):
    common = ["--model", models / "gpt2", "--dataset", data / "texts"]
    finetune(*common)
    (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").unlink()
    verdict = finetune(*common, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-3")
    assert "checkpoint-3 has no optimizer.pt" in verdict.error


def test_a_run_without_an_update_is_an_error(models, finetune, tmp_path):
    texts = {"text": ["a dog sees a cat"] * 3}
    DatasetDict({"train": Dataset.from_dict(texts), "test": Dataset.from_dict(texts)}).save_to_disk(tmp_path / "few")
    named = ("--model", models / "gpt2", "--dataset", tmp_path / "few", "--valid_share", "0.34")
    verdict = finetune(*named, "--dataloader_drop_last", "true")
    assert verdict.status == 1
    assert "no update was done: 2 training samples do not fill a batch" in verdict.error, verdict


def test_settings_that_cannot_be_saved_are_refused_before_training(models, data, finetune, tmp_path):
    shutil.copytree(models / "gpt2", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"top_p": 0.5, "do_sample": false}')
    verdict = finetune("--model", tmp_path / "model", "--dataset", data / "texts")
    assert "its generation_config.json is not valid" in verdict.error


def test_a_run_is_not_gone_on_with_by_other_options(models, data, finetune):
    common = ["--dataset", data / "texts", "--resume_from_checkpoint", "last"]
    finetune("--model", models / "gpt2", *common[:2], "--ba_m", 2)
    verdict = finetune("--model", models / "gpt2", *common, "--ba_m", 3)
    assert "holds a run with other options (--ba_m 2 there and 3 here)" in verdict.error
    assert "gpt2 there and" in finetune("--model", models / "llama", *common, "--ba_m", 2).error
    assert finetune("--model", models / "gpt2", *common, "--ba_m", 2, "--copies_per_pass", 1).status == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seed 2", "--seed 42 there and 2 here"),
        ("--learning_rate 0.5", "--learning_rate 0.01 there and 0.5 here"),
        ("--per_device_train_batch_size 2", "--per_device_train_batch_size 4 there and 2 here"),
        ("--lr_scheduler_type cosine", "--lr_scheduler_type linear there and cosine here"),
    ],
)
def test_nor_by_other_options_of_transformers(options, said, models, data, finetune, tmp_path):
    common = ["--model", models / "gpt2", "--dataset", data / "texts"]
    finetune(*common)
    resume = ["--resume_from_checkpoint", "last"]
    verdict = call_with(finetune, [*common, *resume], options.split(), tmp_path / "run")
    assert f"holds a run with other options ({said})" in verdict.error
    assert call_with(finetune, [*common, *resume], ["--logging_steps", "2"], tmp_path / "run").status == 0


def test_a_checkpoint_of_another_folder_is_held_to_the_options_of_its_run(models, data, finetune, tmp_path):
    common = ["--model", models / "gpt2", "--dataset", data / "texts"]
    finetune(*common, out="old")
    old = ["--resume_from_checkpoint", tmp_path / "old" / "checkpoint-2"]
    assert "--ba_m 1 there and 3 here" in finetune(*common, *old, "--ba_m", 3, out="new").error
    assert finetune(*common, *old, out="new").status == 0
    kept = [json.loads((tmp_path / name / "options.json").read_text()) for name in ("old", "new")]
    assert kept[0] == kept[1]
    assert "new already holds a run (checkpoint-3): go on with it by" in finetune(*common, *old, out="new").error
    (tmp_path / "old" / "options.json").unlink()  # of a plain Trainer
    verdict = finetune(*common, *old, out="newer")
    assert "old has no options.json: whether that run had the same options cannot be told" in verdict.stdout
    assert verdict.status == 0


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_its_result(clip, models, data, finetune, tmp_path):
    options = ["--learning_rate", "1e38", "--max_grad_norm", clip, "--warmup_steps", 0]
    folder = tmp_path / "wild"
    common = ["--model", models / "gpt2", "--dataset", data / "texts"]
    verdict = call_with(finetune, [*common], options, folder)
    assert re.search("(loss of the last 1 updates is (nan|inf)|weights are not finite)", verdict.error)
    assert not (folder / "model.safetensors").exists()
