"""The model folder: weights, tokenizer, decoding defaults, and a card that says how it was made."""

from collections.abc import Mapping
from pathlib import Path

from transformers import MarianMTModel, MarianTokenizer

from tasks.cli.files import write_text
from tasks.scoring.bleu import BleuScore
from tasks.translation.config import TranslationConfig


def save_model_folder(
    folder: Path,
    model: MarianMTModel,
    tokenizer: MarianTokenizer,
    config: TranslationConfig,
    *,
    data: str,
    updates: int,
    scores: Mapping[str, BleuScore],
) -> None:
    """Write a folder that `AutoModelForSeq2SeqLM` and `AutoTokenizer` load, with its card in README.md."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", _card(folder, config, data, updates, scores))


def _card(folder: Path, config: TranslationConfig, data: str, updates: int, scores: Mapping[str, BleuScore]) -> str:
    source, target = config.source_lang, config.target_lang
    results = [f"- {name}: {score}" for name, score in scores.items()]
    result = "\n".join(results or ["not scored: the run had no test text"])
    passes = f"copies per pass {config.copies_per_pass}, reproducible copies {config.reproducible_copies}"
    dropouts = (
        f"{config.dropout} on embeddings and residual branches, {config.attention_dropout} on attention weights, "
        f"{config.activation_dropout} inside feed-forward layers"
    )
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

# Translation {source} -> {target}, trained with Batch Augmentation (M = {config.ba_m})

| | |
|---|---|
| copies of each pair in an update, M | {config.ba_m} ({passes}) |
| data | {data} |
| updates | {updates:,} (the checkpoint with the lowest validation loss) |
| batch | {config.max_tokens:,} padded tokens before repetition, times {config.accumulation} a rank |
| dropout, the random transform T | {dropouts} |

Test:

{result}

The best checkpoint was chosen on the validation text. To load the model, from the folder that holds `{folder.name}`:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("{folder.name}")
tokenizer = AutoTokenizer.from_pretrained("{folder.name}")
batch = tokenizer(["..."], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
```

Batch Augmentation: Hoffer et al. 2020, "Augment Your Batch", arXiv:1901.09335.
"""
