"""The model folder: weights, tokenizer, decoding defaults, and a card that says how it was made."""

from collections.abc import Mapping
from pathlib import Path

from transformers import MarianMTModel, MarianTokenizer

from tasks.cli.files import write_text
from tasks.scoring.bleu import BleuScore


def save_model_folder(
    folder: Path,
    model: MarianMTModel,
    tokenizer: MarianTokenizer,
    *,
    languages: tuple[str, str],
    made_by: Mapping[str, str],
    scores: Mapping[str, BleuScore],
) -> None:
    """Write a folder that `AutoModelForSeq2SeqLM` and `AutoTokenizer` load, with its card in README.md."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", _card(folder.name, languages, made_by, scores))


def _card(folder: str, languages: tuple[str, str], made_by: Mapping[str, str], scores: Mapping[str, BleuScore]) -> str:
    source, target = languages
    rows = "\n".join(f"| {what} | {how} |" for what, how in made_by.items())
    result = "\n".join([f"- {name}: {score}" for name, score in scores.items()] or ["not scored: no test text"])
    return f"""---
language:
- {source}
- {target}
library_name: transformers
pipeline_tag: translation
tags:
- batch-augmentation
- seqba
---

# Translation {source} -> {target}, trained with Batch Augmentation

| | |
|---|---|
{rows}

Test:

{result}

The best checkpoint was chosen on the validation text. To load the model, from the folder that holds `{folder}`:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
batch = tokenizer(["..."], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
```

Batch Augmentation: Hoffer et al. 2020, "Augment Your Batch", arXiv:1901.09335.
"""
