"""The tokenizer of a run: the weights' own, or the one that `data.tokenizer` names.

Enters: a `WeightsSource` and the configured name. Leaves: a transformers tokenizer. Left out: tokenising (`data`).

Two vocabularies compared.

Enters: token → number of two tokenizers. Leaves: how they differ, in words, with the first few tokens of each kind.
Left out: what is done about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loopos.config.diagnostics import SettingError, UserError
from loopos.config.paths import expanded
from loopos.models.broken_files import broken_as_user_error
from loopos.models.gguf import converted_folder
from loopos.models.resolve import EMBEDDED, WeightsSource, base_of_adapter, embedded_model, weights_source
from loopos.models.task_layout import backbone_config
from loopos.storage.hub import require_hub
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest, is_weights

_KEY = "data.tokenizer"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def open_tokenizer(
    source: WeightsSource, named: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Opens the tokenizer that `named` (a value of `data.tokenizer`) says, else the one that came with the weights.

    Raises `UserError` where there is none or it cannot be read.
    """
    place = _named_place(named) if named is not None else _place_beside(source)
    if isinstance(place, Path):
        check_manifest(place if place.is_dir() else place.parent, of=lambda name: not is_weights(name))
    with broken_as_user_error(
        f"no tokenizer in {place}", advice="put tokenizer.json there or name one in data.tokenizer"
    ):
        if isinstance(place, Path):
            _check_json(place if place.is_file() else place / "tokenizer.json")
        if isinstance(place, Path) and place.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(place))  # type: ignore[no-untyped-call]
        config = backbone_config(place) if isinstance(place, Path) and (place / "config.json").is_file() else None
        opened = AutoTokenizer.from_pretrained(str(place), config=config, trust_remote_code=trust_remote_code)
    assert isinstance(opened, PreTrainedTokenizerBase)
    return opened


def _check_json(file: Path) -> None:
    """Raises `UserError` for a tokenizer.json that is no JSON, or describes no tokenizer."""
    if file.is_file() and not isinstance(read_object(file).get("model"), dict):
        raise ValueError(f"{file.name} describes no tokenizer")


def _place_beside(source: WeightsSource) -> Path | str:
    if source.kind == "new":
        raise UserError(
            f'data.tokenizer is missing: a new model needs one; name a folder with tokenizer.json or "{EMBEDDED}"'
        )
    if source.path is None:
        return source.actual
    if source.kind == "adapter" and not (source.path / "tokenizer_config.json").is_file():
        return _place_beside(weights_source(base_of_adapter(source.path)))
    if source.kind == "gguf":
        return converted_folder(source.path)
    folder = source.path if source.kind in ("folder", "adapter") else source.path.parent
    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(
            f"no tokenizer in {folder}: expected one of {', '.join(_FILES)}; put it there or name one in data.tokenizer"
        )
    return folder


def _named_place(named: str) -> Path | str:
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


def vocabulary_difference(own: Mapping[str, int], theirs: Mapping[str, int], source: str) -> str:
    """How `theirs` differs from `own`, which is that of `place`; "" where it does not."""
    kinds = {
        f"that {source} lacks": [token for token in theirs if token not in own],
        "that it lacks": [token for token in own if token not in theirs],
        "with another number": [token for token in own if theirs.get(token, own[token]) != own[token]],
    }
    return ", ".join(f"{len(tokens):,} {kind} ({_some(tokens)})" for kind, tokens in kinds.items() if tokens)


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens[:_MOST_NAMED])
    return f"{shown}, …" if len(tokens) > _MOST_NAMED else shown
