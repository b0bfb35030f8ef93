"""The mask audit of a saved transformers model, or of a configuration with random weights, on a random batch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from seqba.audit import IdenticalCopiesError, MaskAudit, audit_masks, check_copies_differ
from tasks.cli.errors import UserError, identical_copies
from tasks.cli.options import check_least, option
from tasks.models.names import model_in
from tasks.models.pretrained import explaining

# By which head a configuration without `architectures` gets its model, the first that its family has. The last
# column says when: encoders have a causal head in transformers too, but are not trained by it.
_HEADS = (
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_MASKED_LM_MAPPING"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")


@dataclass(frozen=True)
class AuditConfig:
    """The sizes of an audit, options of `scripts/audit_masks.py`."""

    batch_size: int = option(4, "B, samples before repetition")
    length: int = option(16, "tokens a sample, of text models")
    num_copies: int = option(4, "copies to compare, M; more copies give a sharper estimate of the variance")

    def __post_init__(self) -> None:
        check_least(self, {"batch_size": 1, "length": 2, "num_copies": 2})  # copies are compared


def audit_model(path: str, config: AuditConfig, *, seed: int = 0) -> MaskAudit:
    """Load a model folder (or a config.json, in it or alone), make a batch that the model takes, and audit it.

    `seed` is that of the batch, and of the weights where the folder has none.

    Raises:
        UserError: the path or the model's kind cannot be used, or the model takes no text of that length.
    """
    torch.manual_seed(seed)
    model = load_model(Path(path))
    return audit_masks(model, random_batch(model, config.batch_size, config.length), config.num_copies)


def refuse_identical_copies(
    model: nn.Module, batch: dict[str, Tensor], forward: Callable[[nn.Module, Any], Tensor], remedy: str
) -> None:
    """M copies cost M times as much: not where all copies of a batch are the same.

    Raises:
        UserError: with the table of the audit, and `remedy`, the option that makes copies differ.
    """
    audit = audit_masks(model, batch, forward=forward, measure_variance=False)
    try:
        check_copies_differ(audit)
    except IdenticalCopiesError as error:
        raise identical_copies(error, remedy) from error


def load_model(path: Path) -> nn.Module:
    """The model that a folder or a config.json describes, in float32, with its weights where it has any."""
    path = model_in(path)
    folder = path if path.is_dir() else path.parent
    file = path / "config.json" if path.is_dir() else path
    if (folder / "adapter_config.json").exists() and not file.exists():
        raise UserError(
            f"{path} holds a peft adapter alone; merge it, or call seqba.audit_masks on the model in Python"
        )
    if not file.is_file():
        raise UserError(f"{file} does not exist; give a model folder with a config.json, or such a file")
    with explaining(f"{file} is no configuration of a transformers model"):
        config = AutoConfig.from_pretrained(file)
    model_class = _model_class(config, file)
    with explaining(f"{path} cannot be made a {model_class.__name__}"):
        if path.is_dir() and any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            return model_class.from_pretrained(path, config=config, dtype=torch.float32, local_files_only=True)
        return model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)


def random_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
    """B random samples of the kind that the model takes: tokens (B, S), or images (B, C, H, W)."""
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size[:2]
        return {"pixel_values": torch.randn(batch_size, getattr(config, "num_channels", 3), height, width)}
    if model.main_input_name != "input_ids":
        raise UserError(
            f"{type(model).__name__} takes {model.main_input_name}, of which this script makes none; call "
            "seqba.audit_masks on it in Python with a batch of yours"
        )
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"--length {length} is more than the {limit} positions of {type(model).__name__}")
    if text.pad_token_id is None:  # classifiers look for a row's last token by it
        text.pad_token_id = config.pad_token_id = 0
    input_ids = _random_tokens(text, batch_size, length)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = _random_tokens(text, batch_size, length)
    return batch


def _random_tokens(config: Any, batch_size: int, length: int) -> Tensor:
    """Rows of ordinary tokens that end with the end-of-sequence token, where there is one."""
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos")}
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 1_000)) if token not in special])
    tokens = ordinary[torch.randint(len(ordinary), (batch_size, length))]
    if isinstance(config.eos_token_id, int):
        tokens[:, -1] = config.eos_token_id
    return tokens


def _model_class(config: PretrainedConfig, file: Path) -> Any:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for head, mapping in _HEADS:
        if type(config) in getattr(transformers, mapping):
            return getattr(transformers, head)
    raise UserError(
        f"{file} names no architecture, and {type(config).__name__} has no head for translation, language modelling or "
        "classification of text or images; name the model's class in its `architectures`"
    )
