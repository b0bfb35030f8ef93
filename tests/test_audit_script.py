"""scripts/audit_masks.py: from a folder or a configuration to the table, or to one line that says why not."""

import json

import pytest
import torch
import transformers
from test_audit_models import TINY, bert, vit

from bad_input import call
from seqba.audit.masks import NO_EFFECT
from tasks.cli.errors import UserError
from tasks.models import pretrained
from tasks.models.audit import AuditConfig, audit_model
from tiny_models import bart, gpt2, llama, marian, t5

SIZES = AuditConfig(batch_size=2, length=7, num_copies=2)


def saved(config, folder, **more):
    file = folder / "config.json"
    file.write_text(json.dumps(config.to_dict() | more))
    return str(file)


def test_a_run_folder_is_taken_for_the_model_in_it(tmp_path):
    run = tmp_path / "run"
    marian().save_pretrained(run / "model")
    (run / "config.json").write_text('{"ba_m": 4}')  # a run's options
    assert audit_model(str(run), SIZES).operations == audit_model(str(run / "model"), SIZES).operations
    assert pretrained._local_folder(str(run)) == run / "model"
    assert pretrained._local_folder(str(run / "model")) == run / "model"


@pytest.mark.parametrize(
    ("config", "architectures", "want"),
    [
        (marian().config, None, "MarianMTModel"),
        (t5().config, None, "T5ForConditionalGeneration"),
        (gpt2().config, None, "GPT2LMHeadModel"),
        (gpt2().config, ["GPT2ForSequenceClassification"], "GPT2ForSequenceClassification"),
        (bart().config, ["BartForSequenceClassification"], "BartForSequenceClassification"),
        (llama().config, None, "LlamaForCausalLM"),
        (bert().config, None, "BertForSequenceClassification"),
        (vit().config, None, "ViTForImageClassification"),
    ],
)
def test_a_configuration_becomes_its_model_and_a_batch_that_it_takes(config, architectures, want, tmp_path):
    file = saved(config, tmp_path, architectures=architectures)
    audit = audit_model(file, AuditConfig(batch_size=3, length=7, num_copies=2))
    assert audit.model == want
    assert (audit.num_samples, audit.num_copies) == (3, 2)
    assert audit.copies_differ


def test_a_model_folder_is_audited_with_its_weights(tmp_path):
    model = gpt2()
    with torch.no_grad():  # no dropout reaches the output
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    audit = audit_model(str(tmp_path), SIZES)
    assert {one.reason for one in audit.operations} == {NO_EFFECT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_positions": 6}, "--length 7 is more than the 6 positions"),
        ({"model_type": "no such"}, "no configuration of a transformers model"),
        ({"architectures": ["T5EncoderModel"]}, "cannot be made a T5EncoderModel"),
        (transformers.CLIPTextConfig(**TINY, vocab_size=61).to_dict(), "names no architecture"),
        (transformers.Wav2Vec2Config(**TINY, architectures=["Wav2Vec2ForCTC"]).to_dict(), "takes input_values"),
    ],
)
def test_what_the_script_cannot_use_is_said_in_one_line(change, message, tmp_path):
    file = saved(gpt2().config, tmp_path, **change)
    with pytest.raises(UserError, match=message):
        audit_model(file, SIZES)


def test_a_path_without_a_model_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        audit_model(str(tmp_path / "nothing"), SIZES)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="peft adapter"):
        audit_model(str(tmp_path), SIZES)


def test_the_script_prints_the_table_or_json(tmp_path, monkeypatch, capsys):
    def run_script(*arguments):
        verdict = call("audit_masks.py", [*arguments, "--length", "5", "--num-copies", "2"], monkeypatch, capsys)
        assert verdict.status == 0, verdict.error
        return verdict.stdout

    file = saved(marian(dropout=0.1, encoder_layerdrop=0.2).config, tmp_path)
    audit = json.loads(run_script(file, "--json"))
    assert audit["copies_differ"] is True
    assert run_script(file).endswith(f"{audit['verdict']}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{} --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("{} --length 1", "--length must be at least 2, got 1"),
        ("{} --num-copies 1", "--num-copies must be at least 2, got 1"),
        ("{} --num_copies 1", "--num-copies must be at least 2, got 1"),
        ("{} --num-copies two", "--num-copies: invalid int value: 'two'; --help explains"),
        ("{} --copies 2", "unknown option --copies 2; --help lists"),
        ("", "required: model; --help explains"),
        ("{}", "/nothing does not exist"),
    ],
)
def test_what_the_script_refuses_is_one_line_with_status_1(options, message, tmp_path, monkeypatch, capsys):
    verdict = call("audit_masks.py", options.format(tmp_path / "nothing").split(), monkeypatch, capsys)
    assert (verdict.status, verdict.stdout, verdict.stderr) == (1, "", "")
    assert verdict.error.startswith("error: ")
    assert message in verdict.error
    assert "\n" not in verdict.error
