"""Opens the tokenizer of a run (the one of the weights, or of `data.tokenizer`), and compares two vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loopos.config.diagnostics import SettingError, UserError
from loopos.config.paths import expanded
from loopos.models.broken_files import broken_as_user_error
from loopos.models.gguf import converted_folder
from loopos.models.resolve import EMBEDDED, ModelRef, base_of_adapter, embedded_model, resolve
from loopos.models.task_layout import backbone_config
from loopos.storage.hub import require_hub
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest, is_weights

_KEY = "data.tokenizer"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def open_tokenizer(
    source: str | ModelRef, named: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that `named` (a value of `data.tokenizer`) names, else the one beside the weights of `source`.

    Raises `UserError` if there is none or it cannot be read.
    """
    location = _configured_source(named) if named is not None else _source_beside(resolve(source))
    if isinstance(location, Path):
        check_manifest(location if location.is_dir() else location.parent, of=lambda name: not is_weights(name))
    with broken_as_user_error(
        f"no tokenizer in {location}", advice="put tokenizer.json there or name one in data.tokenizer"
    ):
        if isinstance(location, Path):
            _check_json(location if location.is_file() else location / "tokenizer.json")
        if isinstance(location, Path) and location.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(location))  # type: ignore[no-untyped-call]
        config = (
            backbone_config(location) if isinstance(location, Path) and (location / "config.json").is_file() else None
        )
        opened = AutoTokenizer.from_pretrained(str(location), config=config, trust_remote_code=trust_remote_code)
    assert isinstance(opened, PreTrainedTokenizerBase)
    return opened


def _check_json(file: Path) -> None:
    """Raises `ValueError` for a tokenizer.json that does not describe a tokenizer."""
    if file.is_file() and not isinstance(read_object(file).get("model"), dict):
        raise ValueError(f"{file.name} describes no tokenizer")


def _source_beside(source: ModelRef) -> Path | str:
    if source.storage == "new":
        raise UserError(
            f'data.tokenizer is missing: a new model needs one; name a folder with tokenizer.json or "{EMBEDDED}"'
        )
    if source.path is None:
        return source.name
    if source.storage == "adapter" and not (source.path / "tokenizer_config.json").is_file():
        return _source_beside(resolve(base_of_adapter(source.path)))
    folder = source.path if source.storage == "adapter" else source.local_folder
    if source.storage == "gguf":
        return folder
    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(
            f"no tokenizer in {folder}: expected one of {', '.join(_FILES)}; put it there or name one in data.tokenizer"
        )
    return folder


def _configured_source(named: str) -> Path | str:
    """A folder, a tokenizer file, or a hub id."""
    if named == EMBEDDED:
        return converted_folder(embedded_model())
    path = Path(expanded(named))
    if path.is_dir():
        for folder in (path, path / "model"):
            if any((folder / name).is_file() for name in _FILES):
                return folder
        raise SettingError(_KEY, f"{named} holds no tokenizer; expected one of {', '.join(_FILES)} in it")
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return converted_folder(path)
        return path.parent if (path.parent / "tokenizer_config.json").is_file() else path
    if named.startswith((".", "/", "~")) or named.count("/") > 1 or path.suffix.lower() in (".json", ".gguf", ".model"):
        raise SettingError(
            _KEY, f'{named} does not exist; name a folder, a tokenizer.json or .gguf file, "{EMBEDDED}" or a hub id'
        )
    require_hub(_KEY, named)
    return named


_MOST_NAMED = 5


def vocabulary_difference(own: Mapping[str, int], other: Mapping[str, int], source: str) -> str:
    """How `other`, the vocabulary of `source`, differs from `own`; "" if it does not."""
    kinds = {
        f"that {source} lacks": [token for token in other if token not in own],
        "that it lacks": [token for token in own if token not in other],
        "with another number": [token for token in own if other.get(token, own[token]) != own[token]],
    }
    return ", ".join(f"{len(tokens):,} {kind} ({_some(tokens)})" for kind, tokens in kinds.items() if tokens)


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens[:_MOST_NAMED])
    return f"{shown}, …" if len(tokens) > _MOST_NAMED else shown
