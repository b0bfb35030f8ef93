"""A model of transformers from a folder or the hub, with everything that makes it useless found before it is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tasks.cli.errors import UserError, reason_of
from tasks.models.names import model_in


def load_config_and_tokenizer(name: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load the configuration and the tokenizer of a model folder of transformers, or of a hub id.

    Raises:
        UserError: there is no such folder or hub id, or it has no tokenizer.
    """
    folder = _local_folder(name)
    config = _load(name, "a model's config.json", AutoConfig, folder)
    tokenizer = _load(name, "a tokenizer", AutoTokenizer, folder)
    if folder is not None:
        _check_tokenizer_files(folder, tokenizer)
    return config, tokenizer


def load_translator(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder-decoder and its tokenizer, as `load_config_and_tokenizer` and `load_weights` do.

    Raises:
        UserError: theirs, or the model is no encoder-decoder.
    """
    config, tokenizer = load_config_and_tokenizer(name)
    if not config.is_encoder_decoder:
        raise UserError(f"--model {name} is a {config.model_type}, which is no encoder-decoder and cannot translate")
    return load_weights(name, AutoModelForSeq2SeqLM, tokenizer)[0], tokenizer


def load_weights(
    name: str, loader: Any, tokenizer: PreTrainedTokenizerBase, *, new_head: bool = False, **more: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model (of a folder or a hub id) on the processor, in evaluation mode, and the names of its new weights.

    Args:
        loader: such as `AutoModelForSeq2SeqLM`.
        new_head: whether the layers after the base model may be new.
        more: for `from_pretrained`.

    Raises:
        UserError: weights are incomplete or damaged, or the tokenizer is another model's.
    """
    with _quiet():
        model, report = _load(name, "its weights", loader, _local_folder(name), output_loading_info=True, **more)
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    base = f"{model.base_model_prefix}."
    # a pooler belongs to the head: masked language models have none
    lacking = [key for key in missing if key.startswith(base) and ".pooler." not in key] if new_head else missing
    if lacking:
        raise UserError(f"--model {name} lacks {len(lacking)} of its weights ({lacking[0]} ...): they would be random")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"--model {name}: its tokenizer has {len(tokenizer)} pieces, the model only {rows}; one is another's"
        )
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise UserError(f"--model {name}: its tokenizer has the id {highest}, the model only those below {rows}")
    return model.eval(), missing


def use_languages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codes: tuple[str | None, str | None], options: str
) -> None:
    """Set a multilingual model and its tokenizer (mBART's, M2M100's, NLLB's) to a source and a target language.

    The codes are the tokenizer's own, such as en_XX, None where they are not given; messages name the `options` by
    which a user gives them. The model's `generate` begins with the target language then.

    Raises:
        UserError: codes are missing, unknown, or given for a tokenizer that knows no languages.
    """
    multilingual: Any = tokenizer if hasattr(tokenizer, "set_src_lang_special_tokens") else None
    if multilingual is None:
        if any(codes):
            raise UserError(f"{options}: the model's {type(tokenizer).__name__} knows no languages; leave them out")
        return
    if not all(codes):
        raise UserError(f"the model's {type(tokenizer).__name__} is multilingual: name the two languages by {options}")
    ids = [_language_id(multilingual, code) for code in codes]
    for code, number in zip(codes, ids, strict=True):
        if number is None:
            raise UserError(f"{options}: the model's {type(tokenizer).__name__} knows no language {code!r}")
    multilingual.tgt_lang = codes[1]
    multilingual.src_lang = codes[0]
    assert model.generation_config is not None
    model.generation_config.forced_bos_token_id = ids[1]


def _language_id(tokenizer: Any, code: str | None) -> int | None:
    table: dict[str | None, int] | None = getattr(tokenizer, "lang_code_to_id", None)
    if table is not None:
        return table.get(code)
    number = tokenizer.convert_tokens_to_ids(code)
    return None if number == tokenizer.unk_token_id else int(number)


def _local_folder(name: str) -> Path | None:
    """The folder that `name` is, or None where it is a hub id."""
    folder = model_in(Path(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--model {name} has no config.json: it is not a model folder of transformers")
        return folder
    if folder.exists():
        raise UserError(f"--model {name} is a file; a model is a folder, or a hub id")
    if name.startswith((".", "/", "~")) or os.path.isabs(name) or name.count("/") > 1:  # a hub id has one slash at most
        raise UserError(f"--model {name}: there is no such folder")
    return None


def _load(name: str, what: str, loader: Any, folder: Path | None, **more: Any) -> Any:
    fault = f"--model {name} is neither a folder here nor a hub id that this machine can download or has in its cache"
    if folder is not None:
        fault = f"--model {name}: {what} cannot be loaded from this folder"
    with explaining(fault):
        return loader.from_pretrained(name if folder is None else str(folder), **more)


@contextmanager
def explaining(fault: str) -> Iterator[None]:
    """Turn the dozen unrelated errors of transformers, the hub and safetensors into a UserError: `fault (reason)`."""
    try:
        yield
    except Exception as error:
        reason = reason_of(error).rstrip(".")
        raise UserError(f"{fault} ({reason})") from error


def _check_tokenizer_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers makes some tokenizers out of nothing where a folder has none: empty ones."""
    settings = ("tokenizer_config.json", "special_tokens_map.json")
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}.difference(settings)
    if tokenizer.vocab_files_names and not any((folder / name).is_file() for name in names):
        raise UserError(
            f"--model {folder} has no tokenizer (none of {', '.join(sorted(names))}): save the model's there with "
            "tokenizer.save_pretrained"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' loading report: `load_weights` checks its content and raises."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
