"""`loopos.merge`, `prune`, `quantize`, `export` and `ensemble`: a new folder made of models.

Each does what the command of its name does, by the same function of its room, and returns what the command prints.
torch is imported when one runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack

from loopos.api import Model, location_of

if TYPE_CHECKING:
    from loopos.compression.prune import PruningResult
    from loopos.compression.quantize import QuantizationResult
    from loopos.config.compression import Recipe
    from loopos.ensembling.ensemble import EnsembleResult
    from loopos.exporting.export import Exported
    from loopos.merging.merge import MergeResult

_RECIPES = (".json", ".yaml", ".yml")


class MergeKeywords(TypedDict, total=False):
    """The other keys of a merge recipe (`MergeConfig`) as arguments of `merge`."""

    description: str
    t: float | list[float]
    scale: float | list[float]
    density: float | list[float]
    epsilon: float | list[float]
    drop_smallest: float | list[float]
    drop_largest: float | list[float]
    normalize: bool | None
    patterns: list[dict[str, Any]]
    tokenizer: str
    result: Literal["model", "adapter"]
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    seed: int
    shard_gigabytes: float
    validation_data: str | os.PathLike[str] | None
    metric: str | None


class RecipeKeywords(TypedDict, total=False):
    """The keys that recipes of pruning and quantization share."""

    calibration_rows: int
    calibration_tokens: int
    columns: dict[str, str]
    evaluate: str | os.PathLike[str] | None
    window: int | None
    stride: int | None
    seed: int
    device: Literal["auto", "cpu", "cuda", "mps"]


class PruningKeywords(RecipeKeywords, total=False):
    """The other keys of a `PruningRecipe` as arguments of `prune`."""

    pattern: str | None
    scope: Literal["layer", "global"]
    calibration: str | os.PathLike[str] | None


class QuantizationKeywords(RecipeKeywords, total=False):
    """The other keys of a `QuantizationRecipe` as arguments of `quantize`."""

    group_size: Literal[32, 64, 128, 256] | None
    calibration: Literal["none", "gptq", "awq"]
    calibration_text: str | os.PathLike[str] | None
    keep: list[str]


def merge(
    models: Sequence[Model] | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    method: str | None = None,
    base: Model | None = None,
    weights: Sequence[float | list[float]] | None = None,
    evaluate: Sequence[str | os.PathLike[str]] | None = None,
    device: str = "auto",
    quiet: bool = True,
    **recipe: Unpack[MergeKeywords],
) -> MergeResult:
    """Merges models or adapters into one: `loopos.merge(["run_a", "run_b"], method="slerp", output="merged", t=0.3)`.

    Args:
        models: The models, in order; or the path of a recipe (.json or .yaml), whose keys the other arguments replace.
        output: Folder to write.
        method: "linear", "slerp", "ties", …; docs/merging.md has all.
        base: The model that the others were trained from.
        weights: A factor for each model.
        evaluate: Files of rows on which all models and the result are measured.
        device: Where models are measured.
        quiet: Show neither progress nor notes; the result holds the notes.
        recipe: The other keys of a recipe, such as `t`, `density`, `tokenizer`, `dtype` and `seed`.

    Raises:
        ConfigError: With every mistake in the recipe.
        UserError: For models that cannot be merged; nothing is written then.
    """
    from loopos.config.diagnostics import UserError
    from loopos.config.load import load_recipe
    from loopos.config.merge import MergeConfig
    from loopos.config.source import read_source, source_of

    keys: dict[str, Any] = {"method": method, "output_dir": output, "evaluate": evaluate, **recipe}
    keys["base"] = None if base is None else location_of(base)
    keys = {key: _plain(value) for key, value in keys.items() if value is not None}
    if isinstance(models, str | os.PathLike):
        if not _is_recipe(os.fspath(models)):
            raise UserError(f'models: got "{models}"; expected a list of models, or a recipe (.json or .yaml)')
        values = keys | {f"models.{i}.weight": weight for i, weight in enumerate(weights or ())}
        loaded = load_recipe(read_source(os.fspath(models)), [], MergeConfig, values=values)
    else:
        if weights is not None and len(weights) != len(models):
            raise UserError(f"weights: got {len(weights)}; expected {len(models)}, one per model, in order")
        named = [{"model": location_of(each)} for each in models]
        entries = (
            [{**each, "weight": weight} for each, weight in zip(named, weights, strict=True)] if weights else named
        )
        loaded = load_recipe(source_of({"models": entries, **keys}), [], MergeConfig)
    assert isinstance(loaded.config, MergeConfig)
    from loopos.merging.merge import merge as merge_models
    from loopos.training.precision import pick_device

    with _shown("tensors", quiet=quiet) as bar:
        for sentence in loaded.notes:
            bar.say(f"note: {sentence}")
        return merge_models(
            loaded.config,
            device=pick_device(device).type,
            note=bar.say,
            on_progress=lambda done, total: bar.progress(done, total),
        )


def prune(
    model: Model,
    *,
    output: str | os.PathLike[str],
    sparsity: float | list[float] | None = None,
    method: str | None = None,
    quiet: bool = True,
    **recipe: Unpack[PruningKeywords],
) -> PruningResult:
    """Sets weights to zero, or removes parts of a model: `loopos.prune("outputs/run", sparsity=0.5, output="sparse")`.

    `result.after[0].measured` and `.rates` against `result.before` say what it cost and what it gained.

    Args:
        model: The model, or the path of a recipe (.json or .yaml), whose keys the other arguments replace.
        output: New folder to write.
        sparsity: Fraction to remove; a list makes one model each.
        method: "magnitude" (the default), "wanda", "sparsegpt", "heads", "channels" or "layers".
        quiet: Show neither progress nor notes.
        recipe: The other keys of a recipe: `pattern`, `scope`, `calibration`, `evaluate`, `device`, …

    Raises:
        ConfigError: With every mistake in the recipe.
        UserError: For a model, data or output that does not do; nothing is written then.
    """
    from loopos.config.compression import PruningRecipe
    from loopos.config.load import read_recipe

    keys = {"method": method or _unless_recipe(model, "magnitude"), "sparsity": sparsity, **recipe}
    checked = read_recipe(PruningRecipe, *_recipe(model, keys))
    from loopos.compression.prune import Pruner

    with _shown("blocks", quiet=quiet) as bar:
        return Pruner(checked, device=_device(checked), say=bar.say, progress=bar.progress).prune(Path(output))


def quantize(
    model: Model,
    *,
    output: str | os.PathLike[str],
    format: Literal["int8", "int8-dynamic", "int4"] | None = None,
    quiet: bool = True,
    **recipe: Unpack[QuantizationKeywords],
) -> QuantizationResult:
    """Stores weights in 8 or 4 bits: `loopos.quantize("outputs/run", format="int8", output="small").after[0].verdict`.

    Args:
        model: The model, or the path of a recipe (.json or .yaml), whose keys the other arguments replace.
        output: New folder to write.
        format: "int8", "int8-dynamic" (activations too) or "int4"; the recipe's key `method`.
        quiet: Show neither progress nor notes.
        recipe: The other keys of a recipe: `group_size`, `calibration`, `calibration_text`, `keep`, `evaluate`, …

    Raises:
        ConfigError: With every mistake in the recipe.
        UserError: For a model, data or output that does not do; nothing is written then.
    """
    from loopos.config.compression import QuantizationRecipe
    from loopos.config.diagnostics import ConfigError
    from loopos.config.load import read_recipe

    try:
        checked = read_recipe(QuantizationRecipe, *_recipe(model, {"method": format, **recipe}))
    except ConfigError as error:
        # The recipe's key has the name that it has in a file.
        named = [
            replace(each, field="format", hint="") if each.field == "method" else each for each in error.diagnostics
        ]
        raise ConfigError(named) from None
    from loopos.compression.quantize import Quantizer

    with _shown("layers", quiet=quiet) as bar:
        return Quantizer(checked, device=_device(checked), say=bar.say, progress=bar.progress).quantize(Path(output))


def export(
    model: Model,
    *,
    format: Literal["huggingface", "gguf", "adapter", "modelfile", "onnx"],
    output: str | os.PathLike[str],
    type: str | None = None,
    push: str | None = None,
    license: str | None = None,
    check: bool = True,
    quiet: bool = True,
) -> Exported:
    """Writes a folder that other programs open: `loopos.export("outputs/run", format="gguf", output="shipped")`.

    The export is opened again and compared with the model; a warning says where a number format loses too much.

    Args:
        model: A run, a model folder, an adapter folder, a transformers checkpoint or "smollm2-135m".
        format: What other programs open.
        output: New folder to write.
        type: Number format of the weights: "f32", "f16" or "bf16"; for gguf and modelfile also "q8_0" and "q4_0".
        push: Repository owner/name on the hub to upload the folder to.
        license: License that the model card names.
        check: Whether the export is opened again and compared.
        quiet: Show no progress.

    Raises:
        UserError: For a model that the format cannot hold, or arguments in conflict; nothing is written then.
    """
    from loopos.exporting.settings import ExportSettings, check_settings
    from loopos.storage.output_folder import require_new_folder

    settings = ExportSettings(format=format, type=type, push=push, license=license, check=check)
    check_settings(settings)
    require_new_folder(Path(output))
    from loopos.exporting.export import export as export_model

    with _shown("export", quiet=quiet) as bar:
        exported = export_model(location_of(model), Path(output), settings, on_progress=bar.progress)
    if exported.warning:
        warnings.warn(exported.warning, stacklevel=2)
    return exported


def ensemble(
    models: Sequence[Model],
    *,
    output: str | os.PathLike[str],
    method: str = "mean",
    weights: Sequence[float] = (),
    fit: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    copy: bool = False,
    columns: Mapping[str, str] | None = None,
    device: str = "auto",
    quiet: bool = True,
) -> EnsembleResult:
    """Combines models into one that `load` opens: `loopos.ensemble(["run_a", "run_b"], output="together")`.

    Args:
        models: Classifiers, regressors or language models.
        output: New folder to write.
        method: "mean", "logits", "weighted" or "majority"; for language models "mean", "logits" or "vote".
        weights: Of language models, in proportion; equal by default.
        fit: Labeled rows to fit the weights of "weighted" on.
        test: Rows or text to measure members and ensemble on.
        copy: Copy the members into the folder, instead of storing their paths.
        columns: Role → column of `fit` and `test`.
        device: Where the models run.
        quiet: Show no progress.

    Raises:
        UserError: For models that cannot be combined, or arguments in conflict; nothing is written then.
    """
    from loopos.cli.opened_models import is_task_model
    from loopos.config.diagnostics import UserError
    from loopos.training.precision import pick_device

    members = [location_of(each) for each in models]
    paths = {"fit": None if fit is None else os.fspath(fit), "test": None if test is None else os.fspath(test)}
    is_language = bool(members) and not any(is_task_model(member) for member in members)
    kind = "language models" if is_language else "classifiers and regressors"
    idle = {"fit": fit, "columns": columns} if is_language else {"weights": weights}
    if unused := [name for name, value in idle.items() if value]:
        raise UserError(f"{', '.join(unused)}: no use for {kind}; leave {'it' if len(unused) == 1 else 'them'} out")
    with _shown("members", quiet=quiet) as bar:
        from loopos.ensembling.ensemble import EnsembleSettings, combine

        settings = EnsembleSettings(method=method, weights=tuple(weights), **paths, copy=copy, columns=columns)
        return combine(members, Path(output), settings, device=pick_device(device).type, on_progress=bar.progress)


class _Shown(Protocol):
    """Where progress and messages go."""

    def progress(self, completed: int, total: int, name: str = "") -> None: ...

    def say(self, line: str) -> None: ...


class _Silent:
    """Shows nothing."""

    def progress(self, completed: int, total: int, name: str = "") -> None: ...

    def say(self, line: str) -> None: ...


@contextmanager
def _shown(unit: str, *, quiet: bool) -> Iterator[_Shown]:
    """Progress of `unit`, while the libraries below are silent."""
    from loopos.cli.bar import Bar
    from loopos.models.quiet import quiet_libraries

    with quiet_libraries():
        if quiet:
            yield _Silent()
        else:
            with Bar(unit) as bar:
                yield bar


def _device(recipe: Recipe) -> str:
    from loopos.training.precision import pick_device

    return pick_device(recipe.device).type


def _is_recipe(location: str) -> bool:
    return location.lower().endswith(_RECIPES) and not os.path.isdir(location)


def _unless_recipe(model: Model, value: str) -> str | None:
    """A default that a recipe file has itself."""
    return None if _is_recipe(location_of(model)) else value


def _recipe(model: Model, keys: Mapping[str, Any]) -> tuple[str | Mapping[str, object], dict[str, Any]]:
    """A recipe file and the values that replace its own, or the keys of a recipe for the model."""
    location = location_of(model)
    actual = {key: _plain(value) for key, value in keys.items() if value is not None}
    return (location, actual) if _is_recipe(location) else ({"model": location, **actual}, {})


def _plain(value: Any) -> Any:
    """A value as a recipe file has it: paths as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
