"""scripts/audit_masks.py: from a folder or a configuration to the table, or to one line that says why not."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_audit_models import TINY, bert, vit

from tasks.audit import audit_model
from tasks.errors import UserError
from tiny_models import bart, gpt2, llama, marian, t5

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit_masks.py"


def saved(config, folder, **more):
    file = folder / "config.json"
    file.write_text(json.dumps(config.to_dict() | more))
    return str(file)


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
    audit = audit_model(file, batch_size=3, length=7, num_copies=2)
    assert audit.model == want
    assert (audit.num_samples, audit.num_copies) == (3, 2)
    assert audit.copies_differ


def test_a_model_folder_is_audited_with_its_weights(tmp_path):
    model = gpt2()
    with torch.no_grad():  # a head of zeros: no dropout reaches the output
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    audit = audit_model(str(tmp_path), batch_size=2, length=7, num_copies=2)
    assert "the same for all copies under these weights" in audit.variance_note


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"length": 65}, "--length 65 is more than the 64 positions"),
        ({}, {"batch_size": 0}, "got 0 samples"),
        ({}, {"num_copies": 1}, "2 of them at least"),
        ({"model_type": "no such"}, {}, "no configuration of a transformers model"),
        ({"architectures": ["T5EncoderModel"]}, {}, "cannot be made a T5EncoderModel"),
        (transformers.CLIPTextConfig(**TINY, vocab_size=61).to_dict(), {}, "names no architecture"),
        (transformers.Wav2Vec2Config(**TINY, architectures=["Wav2Vec2ForCTC"]).to_dict(), {}, "takes input_values"),
    ],
)
def test_what_the_script_cannot_use_is_said_in_one_line(change, options, message, tmp_path):
    file = saved(gpt2().config, tmp_path, **change)
    with pytest.raises(UserError, match=message):
        audit_model(file, **{"batch_size": 2, "length": 7, "num_copies": 2, **options})


def test_a_path_without_a_model_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        audit_model(str(tmp_path / "nothing"), batch_size=2, length=7, num_copies=2)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="peft adapter"):
        audit_model(str(tmp_path), batch_size=2, length=7, num_copies=2)


def test_the_script_prints_the_table_or_json_and_one_line_for_an_error(tmp_path, monkeypatch, capsys):
    def run_script(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--length", "5", "--num-copies", "2"])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    file = saved(marian(dropout=0.1, encoder_layerdrop=0.2).config, tmp_path)
    audit = json.loads(run_script(file, "--json"))
    assert audit["copies_differ"] is True
    assert run_script(file).endswith(f"{audit['verdict']}\n")
    with pytest.raises(SystemExit, match=r"^error: .* does not exist"):
        run_script(str(tmp_path / "nothing"))
