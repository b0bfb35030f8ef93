"""A trained classifier as a folder: weights, what makes the network and its input, and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqba.checkpoint.files import follow_umask
from tasks.cli.errors import UserError, reason_of
from tasks.cli.files import write_json
from tasks.models.folder import write_card
from tasks.models.names import model_in
from tasks.vision.augment import Views
from tasks.vision.data.decode import to_tensor
from tasks.vision.networks import build_model

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_USAGE = """
from PIL import Image
from tasks.vision import load_classifier  # in a checkout of seqba

classifier = load_classifier("{folder}")
print(classifier.classify(Image.open("...")))
"""


@dataclass(frozen=True)
class Classifier:
    """A network with what its input and output mean.

    Attributes:
        network: the name that `build_model` knows.
        model: (rows, 3, H, W) normalised images -> logits.
        classes: names, whose places are the labels.
        views: how images come to the network.
    """

    network: str
    model: nn.Module
    classes: Sequence[str]
    views: Views

    @torch.inference_mode()
    def classify(self, image: object) -> str:
        """The class of a PIL image."""
        self.model.eval()
        pixels: Tensor = self.views.normalize(self.views.evaluation(to_tensor(image))[None])
        return self.classes[int(self.model(pixels).argmax())]


def save_classifier(folder: Path, classifier: Classifier, *, made_by: Mapping[str, str], scores: Sequence[str]) -> None:
    """Write a folder that `load_classifier` reads, with its card."""
    folder.mkdir(exist_ok=True)
    state = {name: x.detach().contiguous() for name, x in classifier.model.state_dict().items()}
    save_file(state, str(folder / _WEIGHTS), metadata={"format": "pt"})
    follow_umask(folder / _WEIGHTS)
    write_json(
        folder / _CONFIG,
        {"network": classifier.network, "classes": list(classifier.classes), "views": asdict(classifier.views)},
    )
    write_card(
        folder,
        title=f"An image classifier, {classifier.network}",
        languages=(),
        library="seqba",
        pipeline="image-classification",
        made_by=made_by,
        scores=scores,
        usage=_USAGE,
    )


def load_classifier(path: str) -> Classifier:
    """Read what `save_classifier` wrote.

    Raises:
        UserError: the folder holds no such model, or a damaged one.
    """
    folder = model_in(Path(path))
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{path} holds no classifier: it has no {_CONFIG}")
    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        if "network" not in config:
            raise UserError(f"{path} holds no classifier of train_vision.py: its {_CONFIG} names no network")
        model = build_model(config["network"], len(config["classes"]))
        model.load_state_dict(load_file(str(folder / _WEIGHTS)))
        return Classifier(config["network"], model.eval(), config["classes"], Views(**config["views"]))
    except UserError:
        raise
    except Exception as error:  # of damaged JSON or weights: many types
        reason = reason_of(error)
        raise UserError(f"{path} holds a damaged classifier: {reason}") from error
