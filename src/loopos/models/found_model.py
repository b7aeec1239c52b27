"""What MODEL names, found: a run, a model folder of LoopOS, any checkpoint of transformers, or an adapter.

Enters: a place. Leaves: a `FoundModel`: its folder, what kind of model it is, what is known of it, and where an
adapter lies that it was trained as. Torch is not imported. Left out: opening it (`opened_model.py`), reading its
tensors (`storage.tensor_files`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.faults import UserError
from loopos.config.paths import MODEL_DESCRIPTION, NEW_WEIGHTS, expanded
from loopos.models.config_check import check_config
from loopos.models.model_folder import Kind, described, kind_of, model_folder, read_description
from loopos.models.sources import ADAPTER_CONFIG, EMBEDDED, base_of_adapter, folder_of, weights_source
from loopos.storage.json_files import read_object

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
