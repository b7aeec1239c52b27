"""What MODEL names, found: a run, a model folder of LoopOS, any checkpoint of transformers, or an adapter.

Enters: a place. Leaves: a `ShippedModel`: its folder, what kind of model it is, what is known of it, and where an
adapter lies that it was trained as. Left out: reading weights (`storage.tensor_files`, `merged_adapter.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.faults import UserError
from loopos.config.paths import MODEL_DESCRIPTION
from loopos.config.preferences import REWARD_TASK
from loopos.evaluation.run_folder import CONFIG, EVENTS, Run, read_run
from loopos.models.gguf import converted_folder
from loopos.models.model_folder import model_folder, read_description
from loopos.models.sources import EMBEDDED, weights_source

Kind: TypeAlias = Literal["language", "head", "reward", "classifier", "encoder"]
"""A language model; a model of LoopOS with a head; a reward model; transformers' sequence classifier; any other."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FIELD = "data.pretrained_weights: "


@dataclass(frozen=True)
class ShippedModel:
    """A model that may be shipped.

    given: as the user named it. folder: what transformers or LoopOS opens; None where there is an adapter alone.
    description: what LoopOS wrote of it; empty for other models. run: the run that it comes from, if it is there.
    adapter: the PEFT folder that it was trained as; base: the weights under that adapter, as a config names them.
    """

    given: str
    kind: Kind
    folder: Path | None
    description: Mapping[str, Any]
    run: Run | None
    adapter: Path | None
    base: str | None

    @property
    def name(self) -> str:
        """A short name: the last part of what was given, of a folder called `model` the run's."""
        path = Path(self.given.rstrip("/"))
        if path.name in ("model", "adapter") and path.exists():
            path = path.resolve().parent
        return path.resolve().name if path.exists() else path.name


def find_model(place: str) -> ShippedModel:
    """What lies at `place`. Raises `UserError` where there is no model, or an ensemble, which is several."""
    path = Path(place).expanduser()
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter_alone(place, path)
    if any((path / name).is_file() for name in (MODEL_DESCRIPTION, f"model/{MODEL_DESCRIPTION}", EVENTS)):
        folder = model_folder(path)
        description = read_description(folder)
        if "ensemble" in description:
            raise UserError(f"{place}: an ensemble, which is several models; wanted one model: export its members")
        adapter = folder.parent / "adapter"
        has_adapter = (adapter / ADAPTER_CONFIG).is_file()
        return ShippedModel(
            given=place,
            kind=_kind_of(description),
            folder=folder,
            description=description,
            run=_run_of(folder.parent),
            adapter=adapter if has_adapter else None,
            base=_base_of(adapter) if has_adapter else None,
        )
    return _checkpoint(place)


def _kind_of(description: Mapping[str, Any]) -> Kind:
    if description.get("task") == REWARD_TASK:
        return "reward"
    return "head" if "pooling" in description else "language"


def _run_of(folder: Path) -> Run | None:
    return read_run(folder) if all((folder / name).is_file() for name in (CONFIG, EVENTS)) else None


def _adapter_alone(place: str, folder: Path) -> ShippedModel:
    """An adapter's folder; beside the folder model/ of its run it is that model."""
    beside = folder.resolve().parent
    if (beside / "model" / MODEL_DESCRIPTION).is_file():
        description = read_description(beside / "model")
        return ShippedModel(
            given=place,
            kind=_kind_of(description),
            folder=beside / "model",
            description=description,
            run=_run_of(beside),
            adapter=folder,
            base=_base_of(folder),
        )
    task = _read(folder / ADAPTER_CONFIG).get("task_type")
    if task != "CAUSAL_LM":
        raise UserError(
            f"{place}: an adapter of task {task}, without the model that its run wrote; wanted the folder of a run, "
            "or an adapter of task CAUSAL_LM"
        )
    return ShippedModel(place, "language", None, {}, None, folder, _base_of(folder))


def _base_of(adapter: Path) -> str:
    base = _read(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter / ADAPTER_CONFIG}: names no base_model_name_or_path; wanted the weights under it")
    return base


def _checkpoint(place: str) -> ShippedModel:
    try:
        source = weights_source(place)
        if source.kind == "gguf" and source.path is not None:
            folder = converted_folder(source.path)
        elif source.kind == "folder" and source.path is not None:
            folder = source.path
        elif source.kind == "hub":
            folder = _from_hub(place)
        else:
            raise UserError(f'{place}: wanted the folder of a model, with config.json, a .gguf file or "{EMBEDDED}"')
    except UserError as problem:
        # The checks behind name the key of a config; here the words come from a command line.
        raise type(problem)(str(problem).removeprefix(_FIELD)) from problem
    architectures = _read(folder / "config.json").get("architectures") or [""]
    kind: Kind = "encoder"
    if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
        kind = "language"
    elif architectures[0].endswith("ForSequenceClassification"):
        kind = "classifier"
    return ShippedModel(place, kind, folder, {}, None, None, None)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, HTTPError, HFValidationError, LocalEntryNotFoundError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{name} is neither a folder here nor reachable on a hub: {first}\nwanted the folder of a run or a model, "
            f'"{EMBEDDED}", or a hub id'
        ) from problem


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{file}: cannot be read: {problem}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{file}: broken: no JSON object")
    return content
