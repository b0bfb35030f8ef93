"""The models that a command line names."""

from collections.abc import Sequence
from pathlib import Path

from tasks.cli.errors import UserError


def check_models(models: Sequence[str]) -> None:
    """Refuse a --model that names none, or one twice, by a UserError."""
    if not models:
        raise UserError("--model DIR names what is evaluated; none is given")
    if repeated := sorted({name for name in models if models.count(name) > 1}):
        raise UserError(f"--model {repeated[0]} is given twice")


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Models by a short name each: a folder's own, its run's where it is just "model"; the full one if two are equal.

    >>> short_names(["runs/m1/model", "runs/m4/model"])
    {'m1': 'runs/m1/model', 'm4': 'runs/m4/model'}
    """
    short = []
    for model in models:
        path = Path(model).resolve() if Path(model).is_dir() else Path(model)
        short.append(path.parent.name if path.name == "model" and path.parent.name else path.name)
    names = [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]
    return dict(zip(names, models, strict=True))


def model_in(folder: Path) -> Path:
    """The model of a run folder; any other path as it is."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder
