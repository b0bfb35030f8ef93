"""A model folder: weights, tokenizer, and a card that says how it was made, its scores, how it is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqba.checkpoint.files import follow_umask
from tasks.cli.files import write_text


def save_model_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    languages: Sequence[str],
    pipeline: str,
    made_by: Mapping[str, str],
    scores: Sequence[str],
    usage: str,
) -> None:
    """Write a folder that transformers' auto classes load, with its card (`write_card`).

    Args:
        folder: to write into.
        model: its generation defaults too.
        tokenizer: of the model.
        title, languages, pipeline, made_by, scores, usage: for the card.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    follow_umask(*folder.glob("*.safetensors"))
    write_card(
        folder,
        title=title,
        languages=languages,
        library="transformers",
        pipeline=pipeline,
        made_by=made_by,
        scores=scores,
        usage=usage,
    )


def write_card(
    folder: Path,
    *,
    title: str,
    languages: Sequence[str],
    library: str,
    pipeline: str,
    made_by: Mapping[str, str],
    scores: Sequence[str],
    usage: str,
) -> None:
    """Write a model's card, `README.md`.

    Args:
        folder: of the model.
        title: what the model does.
        languages: their codes; none where they are not known.
        library: that loads the model.
        pipeline: the hub's name of the task.
        made_by: how it was trained, by what is told.
        scores: a line each.
        usage: Python that loads the model from the folder that holds `folder`; `{folder}` stands for its name.
    """
    front = [f"library_name: {library}", f"pipeline_tag: {pipeline}", "tags:\n- batch-augmentation\n- seqba"]
    if languages:
        front.insert(0, "\n".join(["language:", *(f"- {language}" for language in languages)]))
    rows = "\n".join(f"| {what} | {how} |" for what, how in made_by.items())
    results = "\n".join(f"- {score}" for score in scores) or "not scored: no test text"
    text = f"""---
{chr(10).join(front)}
---

# {title}, trained with Batch Augmentation

| | |
|---|---|
{rows}

Scores:

{results}

To load the model, from the folder that holds `{folder.name}`:

```python
{usage.strip().format(folder=folder.name)}
```

Batch Augmentation: Hoffer et al. 2020, "Augment Your Batch", arXiv:1901.09335.
"""
    write_text(folder / "README.md", text)
