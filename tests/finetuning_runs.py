"""Runs of scripts/finetune.py in a test: tiny models, data sets in the layouts that people have."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Translation, Value
from test_audit_models import bert

from bad_input import call
from tiny_models import bart, gpt2, llama, marian, t5
from word_tokenizer import sentences, word_tokenizer

_BATCHES = "--max_steps 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 5 --learning_rate 0.01"
TRAINING = f"{_BATCHES} --logging_steps 1 --save_steps 2 --use_cpu true --disable_tqdm true".split()
MODELS = {"marian": marian, "bart": bart, "t5": t5, "gpt2": gpt2, "llama": llama, "bert": bert}


@pytest.fixture
def finetune(monkeypatch, capsys, tmp_path):
    """Run the script in this process into `tmp_path/NAME`: its verdict."""

    def run(*argv, out="run"):
        return call("finetune.py", [*argv, *TRAINING, "--output_dir", tmp_path / out], monkeypatch, capsys)

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with model and tokenizer, by family."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)
    return root


def split(count, seed):
    source, target = sentences(count, longest=7, seed=seed), sentences(count, longest=7, seed=seed + 100)
    return {"source": source, "target": target}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data sets in the layouts that people have, by name."""
    root = tmp_path_factory.mktemp("data")
    splits = {"train": split(20, 0), "validation": split(6, 1), "test": split(7, 2)}

    def save(name, made, **more):
        DatasetDict({key: Dataset.from_dict(made(x), **more) for key, x in splits.items()}).save_to_disk(root / name)

    save("pairs", lambda x: x)
    save("renamed", lambda x: {"article": x["source"], "summary": x["target"], "id": list(range(len(x["source"])))})
    save(
        "wmt",
        lambda x: {"translation": [dict(zip(("en", "de"), p, strict=True)) for p in zip(*x.values(), strict=True)]},
        features=Features({"translation": Translation(languages=["en", "de"])}),
    )
    save("texts", lambda x: {"text": x["source"]})
    labels = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes", "maybe"])})
    save("classes", lambda x: {"sentence": x["source"], "label": [n % 3 for n in range(len(x["source"]))]},
         features=labels)  # fmt: skip
    save(
        "named",
        lambda x: {
            "a": x["source"],
            "b": x["target"],
            "kind": ["z" if n % 2 else "k" for n in range(len(x["source"]))],
        },
    )
    Dataset.from_dict({"text": splits["train"]["source"]}).save_to_disk(root / "alone")
    (root / "files").mkdir()
    for key, x in splits.items():
        Dataset.from_dict({"text": x["source"]}).to_parquet(root / "files" / f"{key}-00000-of-00001.parquet")
    return root


def call_with(finetune, argv, options, folder):
    """The script with options that come after those of all tests."""
    before = TRAINING.copy()
    TRAINING.extend(map(str, options))
    try:
        return finetune(*argv, out=folder)
    finally:
        TRAINING[:] = before
