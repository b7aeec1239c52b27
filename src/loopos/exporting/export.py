"""Exports a trained model to a folder that other programs open.

Writes the folder completely or not at all, with README.md, report.md and recipe.json, opens the export again and
compares it with the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from loopos.config.diagnostics import UserError
from loopos.config.own_function import OwnFunction
from loopos.config.paths import RECIPE
from loopos.config.registry import Target, loaded
from loopos.config.variants import EXPORTERS, FLOATS
from loopos.evaluation.blocks import table
from loopos.evaluation.progress import OnProgress, silent
from loopos.exporting import checks as reopened
from loopos.exporting import checks as task_check
from loopos.exporting import gguf as gguf_file
from loopos.exporting import huggingface as hugging_face
from loopos.exporting import onnx as onnx_file
from loopos.exporting.checks import Check, compared, judge
from loopos.exporting.huggingface import DTYPES, require_adapter, weights_folder, write_adapter
from loopos.exporting.language_check import check_folder, check_gguf, reference
from loopos.exporting.model_card import model_card
from loopos.exporting.modelfile import modelfile
from loopos.exporting.settings import ExportSettings, HubClient, check_settings, own_client, push
from loopos.models.folders import HEAD
from loopos.models.quantized_folder import CODES
from loopos.models.resolve import ADAPTER_CONFIG, EMBEDDED, ModelRef, resolve_trained
from loopos.models.task_layout import how_it_opens, layout_in
from loopos.storage.json_files import read_object, save_json
from loopos.storage.manifest import check_manifest
from loopos.storage.output_folder import REPORT, open_output_folder, require_new_folder
from loopos.storage.tensor_files import folder_tensors, holds_weights, require_finite, usual_dtype, weight_files

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CARD = "README.md"
# onnxruntime computes in another order; a fraction of the largest output.
_ONNX_ROUNDING = 1e-3


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how it compares with the model.

    Attributes:
        folder: The export.
        type: Number format of the weights.
        bytes_before: Of the model's weights.
        bytes_after: Of the exported weights.
        check: The comparison of the reopened export with the model; None if skipped.
        notes: What a user should know.
        warning: What a lossy number format lost, if too much; else empty.
        pushed: The URL that it was uploaded to.
    """

    folder: Path
    type: str
    bytes_before: int
    bytes_after: int
    check: Check | None
    notes: tuple[str, ...]
    warning: str
    pushed: str | None


def export(
    source: str,
    out: Path,
    settings: ExportSettings,
    *,
    on_progress: OnProgress = silent,
    client: Callable[[], HubClient] = own_client,
) -> Exported:
    """Exports the model at `source` into the new folder `out`. client: makes the hub client, only for a push.

    Raises `UserError` before anything is written: for an existing folder, a model that the format cannot hold, or
    settings in conflict; `DiskFull`; `MissingRequirement` if a package is missing.
    """
    type_name = check_settings(settings)
    require_new_folder(out)
    model = exportable(source)
    for folder in (model.folder, model.adapter):
        if folder is not None:
            check_manifest(folder)
    _check_format(model, settings)
    needed = _bytes_of(model.folder) if model.folder is not None else 0
    with open_output_folder(out, needed, "the exported model") as partial:
        # Merged weights stay inside the partial folder while needed, and vanish with it if the process dies.
        scratch = partial / ".scratch"
        scratch.mkdir()
        exported = _write(model, partial, scratch, type_name, settings, title=out.name, on_progress=on_progress)
        shutil.rmtree(scratch)
        (partial / REPORT).write_text(_report(model, exported, settings), encoding="utf-8")
        save_json(partial / RECIPE, {"command": "export", "model": source, **asdict(settings), "type": exported.type})
    pushed = push(out, settings.push, client()) if settings.push is not None else None
    return replace(exported, folder=out, pushed=pushed)


def exportable(source: str | ModelRef) -> ModelRef:
    """The single model in a folder that a name refers to. Raises `UserError`."""
    model = resolve_trained(source)
    if model.is_ensemble:
        raise UserError(f"{model.name}: an ensemble, which is several models; expected one model: export its members")
    if model.weights_file is not None:
        raise UserError(f'{model.name}: expected the folder of a model, with config.json, a .gguf file or "{EMBEDDED}"')
    if model.storage == "adapter" and model.folder is None:
        assert model.path is not None
        task = read_object(model.path / ADAPTER_CONFIG).get("task_type")
        if task not in (None, "CAUSAL_LM"):
            raise UserError(
                f"{model.name}: an adapter of task {task}, without the model that its run wrote; expected the folder "
                "of a run, or an adapter of task CAUSAL_LM"
            )
    if model.storage == "hub":
        model = replace(model, storage="folder", path=model.local_folder)
    # Reads config.json, which is checked before anything is written.
    _ = model.architecture
    return model


def _check_format(model: ModelRef, settings: ExportSettings) -> None:
    output_format = settings.format
    _check_codes(model, settings)
    if output_format == "adapter":
        require_adapter(model)
    if output_format == "onnx":
        onnx_file.check_onnx(model)
    if output_format in ("gguf", "modelfile"):
        if model.architecture != "language":
            raise UserError(
                f"{model.name}: a classifier or regressor; --format {output_format} holds only language models: use "
                "--format huggingface"
            )
        gguf_file.require_gguf()
        if model.folder is not None and holds_weights(model.folder):
            gguf_file.prepare(model.folder, model.name)


def _check_codes(model: ModelRef, settings: ExportSettings) -> None:
    """Raises `UserError` if quantized weights would have to be converted, and so rounded a second time."""
    if model.codes is None or model.folder is None:
        return
    recipe = read_object(model.folder / RECIPE) if (model.folder / RECIPE).is_file() else {}
    # The recipe of an export names its source, which may be quantized too.
    made = None if "command" in recipe else recipe.get("model")
    origin = f"the model before quantization{f' ({made})' if made else ''}"
    if model.codes != CODES:
        raise UserError(f"{model.name}: quantized with {model.codes}, which LoopOS does not read; expected {origin}")
    if settings.format != "huggingface":
        raise UserError(
            f"{model.name}: quantized: --format {settings.format} would round its weights a second "
            f"time; use {origin}, or --format huggingface, which copies the codes"
        )
    if settings.type is not None:
        raise UserError(
            f"--type: got {settings.type} for {model.name}, which is quantized: its codes are copied as they are; "
            f"expected no --type, or {origin}"
        )


def _write(
    model: ModelRef,
    partial: Path,
    scratch: Path,
    type_name: str,
    settings: ExportSettings,
    *,
    title: str,
    on_progress: OnProgress,
) -> Exported:
    """Fills the folder, reopens and checks the export, and adds the model card."""
    is_adapter = settings.format == "adapter"
    # GGUF's quantized types are made from fp32.
    dtype = DTYPES.get(type_name, torch.float32 if type_name else None)
    folder, origin = (model.folder, "") if is_adapter else weights_folder(model, dtype, scratch)
    file, notes = "", [origin] if origin else []
    own_writer = EXPORTERS[settings.format].function
    if own_writer is not None:
        assert folder is not None
        notes += _written_by(own_writer, settings.format, folder, partial, type_name)
    elif is_adapter:
        write_adapter(model, partial, dtype)
    elif settings.format == "huggingface":
        assert folder is not None
        if model.codes is None:
            dtype = dtype or usual_dtype(folder_tensors(folder))
            if dtype not in _NAMES:
                raise UserError(f"{model.name}: its weights are {dtype}; set --type to one of {', '.join(FLOATS)}")
        hugging_face.write_hugging_face(folder, partial, model.architecture, dtype, on_progress)
        notes += [how_it_opens(partial)] if model.architecture in ("head", "reward") else []
    elif settings.format == "onnx":
        assert folder is not None
        for name, stored in folder_tensors(folder).items():
            require_finite(name, stored.read())
        file = onnx_file.write_onnx(folder, model.architecture, partial)
    else:
        assert folder is not None
        file = f"{title}-{type_name.upper()}.gguf"
        notes += _write_gguf(model, folder, partial / file, type_name, settings, on_progress)
    own = "own" if model.codes is None else f"{model.codes} codes"
    type_name = type_name or (_NAMES[dtype] if dtype is not None else own)
    check = None
    if settings.check and own_writer is None:
        check = _check(model, folder, partial, file, settings, dtype, type_name, scratch)
    warning = judge(check, type_name, model.name) if check is not None else ""
    card = model_card(
        model,
        title=settings.push or title,
        file=file,
        output_format=settings.format,
        type_name=type_name,
        license=settings.license,
        layout=layout_in(partial)
        if model.architecture in ("head", "reward") and settings.format == "huggingface"
        else None,
    )
    (partial / CARD).write_text(card, encoding="utf-8")
    before = _bytes_of(model.adapter if is_adapter or folder is None else folder)
    return Exported(partial, type_name, before, _bytes_of(partial), check, tuple(notes), warning, None)


def _written_by(writer: Target, name: str, folder: Path, out: Path, type_name: str) -> list[str]:
    """The notes of a user's exporter, after it has written into `out`. Raises `UserError` for an empty folder."""
    function = OwnFunction(f"export format {name}", loaded(writer))
    notes = function(folder, out, type_name, about=f"the model in {folder}")
    if not any(path.name != ".scratch" for path in out.iterdir()):
        raise function.error(f"wrote nothing; expected files in the folder {out}")
    return [*map(str, notes or ()), "not compared with the model: LoopOS does not read this format"]


def _write_gguf(
    model: ModelRef, folder: Path, file: Path, type_name: str, settings: ExportSettings, on_progress: OnProgress
) -> list[str]:
    prepared = gguf_file.prepare(folder, model.name)
    written = None
    if settings.format == "modelfile":
        # Refuse before reading the weights.
        written = modelfile(folder, file.name, adds_bos=prepared.vocabulary.adds_bos, actual=model.name)
    counts = gguf_file.write_gguf(prepared, file, type_name, name=model.title, on_progress=on_progress)
    if written is not None:
        (file.parent / "Modelfile").write_text(written, encoding="utf-8")
    listed = ", ".join(f"{number} {name.upper()}" for name, number in sorted(counts.items()))
    return [f"tensors: {listed}", f"pre-tokenizer: {prepared.vocabulary.pre}"]


def _check(
    model: ModelRef,
    folder: Path | None,
    partial: Path,
    file: str,
    settings: ExportSettings,
    dtype: torch.dtype | None,
    type_name: str,
    scratch: Path,
) -> Check | None:
    """Opens the export with the program that it is for. dtype: the format that weights were rounded to."""
    if settings.format == "adapter":
        assert model.adapter is not None
        if model.base is None:
            return None
        beside = model.folder or model.adapter
        own = [reopened.adapter_outputs(model.adapter, model.base, beside, each) for each in (None, dtype)]
        return compared(own[0], reopened.adapter_outputs(partial, model.base, beside), own[1])
    assert folder is not None
    if model.architecture in ("head", "reward") and settings.format in ("huggingface", "onnx"):
        return task_check.checked(folder, partial, settings.format, exact=_keeps_numbers(folder, settings))
    if settings.format in ("gguf", "modelfile"):
        own_weights = reference(folder, DTYPES.get(type_name), matrices_only=True)
        return check_gguf(own_weights, partial / file, type_name, scratch / "gguf")
    if settings.format == "onnx":
        ids = reopened.probe_ids(folder, AutoConfig.from_pretrained(str(folder)))
        original = reopened.outputs_at(folder, model.architecture)
        return compared(original, onnx_file.onnx_outputs(partial / file, ids), original, tolerance=_ONNX_ROUNDING)
    if model.architecture == "language":
        return check_folder(reference(folder, dtype), partial)
    rounded = reopened.outputs_at(folder, model.architecture, dtype)
    return compared(
        reopened.outputs_at(folder, model.architecture), reopened.outputs_at(partial, model.architecture), rounded
    )


def _keeps_numbers(folder: Path, settings: ExportSettings) -> bool:
    """Whether the export holds the weights of `folder` unchanged, or in a wider format."""
    stored = usual_dtype(folder_tensors(folder))
    return settings.type in (None, "f32") or DTYPES[settings.type] == stored


def _probes(check: Check) -> str:
    if isinstance(check, task_check.TaskCheck):
        return f"{len(task_check.PROBES)} probe texts in one padded batch"
    return f"the probe text “{reopened.PROBE}”"


def _bytes_of(folder: Path | None) -> int:
    """Bytes of the weight files; for a model folder, of those that are opened."""
    assert folder is not None
    if files := weight_files(folder):
        files += [folder / HEAD] if (folder / HEAD).is_file() else []
        return sum(file.stat().st_size for file in files)
    kinds = (".safetensors", ".gguf", ".onnx", ".data")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds)


def _report(model: ModelRef, exported: Exported, settings: ExportSettings) -> str:
    """report.md: sizes, number format and check."""
    rows = [
        ["weights before", f"{exported.bytes_before:,} bytes"],
        ["weights after", f"{exported.bytes_after:,} bytes ({exported.bytes_after / exported.bytes_before:.1%})"],
        ["type", exported.type.upper()],
    ]
    parts = [
        f"# Export of {model.title}",
        f"Format {settings.format}; model of kind {model.architecture}.",
        table(["", "weights"], rows),
    ]
    if exported.notes:
        parts.append("\n".join(f"- {note}" for note in exported.notes))
    parts.append("## Verification")
    if exported.warning:
        parts.append(f"**{exported.warning}**")
    if exported.check is None:
        parts.append("Not compared." if settings.check else "Not compared (--no-check).")
    else:
        parts.append(
            f"Original and export, both in fp32 on CPU, on {_probes(exported.check)}: {exported.check.summary()}."
        )
    return "\n\n".join(parts) + "\n"
