"""The folder of a trained model: where it is, and what it says of itself.

Enters: a place. Leaves: the folder, or its description (`loopos.json`). Left out: the models (`task_folder.py`,
`language_folder.py`), checkpoints of a run in progress (`training.checkpoint`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.extras import install_command
from loopos.config.faults import UserError
from loopos.config.paths import HEAD_FILE, MODEL_DESCRIPTION, expanded
from loopos.config.preferences import REWARD_TASK
from loopos.models.description_check import check_description
from loopos.storage.json_files import read_object
from loopos.storage.manifest import check_manifest

FORMAT = 1
_CHECKPOINT = re.compile(r"step-\d{8,}")
ENSEMBLE = "ensemble"
"""The key under which a folder's description tells the members of an ensemble."""
LANGUAGE_ENSEMBLE = "language_ensemble"
"""That of an ensemble of language models."""
Kind: TypeAlias = Literal["language", "head", "reward", "ensemble"]
"""A language model; a model with a head that predicts labels or values; a reward model; several with a head as one."""


def model_folder(place: str | Path) -> Path:
    """The folder of a trained model: `place` itself, or `model/` in a run's output folder. Raises `UserError` when
    there is none.
    """
    given = Path(expanded(os.fspath(place)))
    for folder in (given, given / "model"):
        if (folder / MODEL_DESCRIPTION).is_file():
            return folder
    refuse_checkpoint(given)
    if (given / "events.jsonl").is_file():
        raise UserError(f"{place}: this run has no finished model yet; go on with loopos train CONFIG --resume")
    raise UserError(f"{place}: no trained model here; wanted the output_dir of a finished run, or its folder model/")


def refuse_checkpoint(place: Path) -> None:
    """Raises `UserError` for the folder of a checkpoint, or of several: they hold what resuming needs, and no model."""
    steps = [place] if _CHECKPOINT.fullmatch(place.name) else sorted(place.glob("step-*"))
    if not steps or not (steps[-1] / "manifest.json").is_file():
        return
    step = int(steps[-1].name.removeprefix("step-"))
    raise UserError(
        f"{place}: a checkpoint holds weights and optimizer for --resume, not a model; to get the model of the newest "
        f"checkpoint, end its run there: loopos train CONFIG --resume training.max_steps={step}"
    )


def described(place: str | Path) -> dict[str, Any]:
    """What LoopOS wrote of the model at a place; nothing where another program made it, or none is there. Raises
    `UserError` for a run without a finished model, and as `read_description`.
    """
    names = (MODEL_DESCRIPTION, f"model/{MODEL_DESCRIPTION}", "events.jsonl")
    if any((Path(expanded(os.fspath(place))) / name).is_file() for name in names):
        return read_description(model_folder(place))
    return {}


def read_description(folder: Path) -> dict[str, Any]:
    """What a trained model's folder says of itself. Raises `UserError` where it is broken, of another version, or not
    what was saved.
    """
    file = folder / MODEL_DESCRIPTION
    check_manifest(folder, of=lambda name: name == MODEL_DESCRIPTION)
    description = read_object(file, advice="make it again: loopos train CONFIG --resume")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{file}: format {description.get('format')}, this LoopOS reads {FORMAT}: written by another version; "
            f"upgrade loopos: {install_command()}"
        )
    kind: str = LANGUAGE_ENSEMBLE if LANGUAGE_ENSEMBLE in description else kind_of(description)
    # A head stands for the key that tells of it, which may be what is missing.
    check_description(file, description, "head" if kind == "language" and (folder / HEAD_FILE).is_file() else kind)
    return description


def remembered_columns(place: str | Path) -> dict[str, str | None]:
    """Role → column of the rows that the model at a place was trained on: those it recorded, or for a run of an older
    version or of a language model those its config names. Nothing for a place without such a record.
    """
    description = described(place)
    if "columns" in description:
        return dict(description["columns"])
    if not description:
        return {}
    config = model_folder(place).parent / "config.json"
    if not config.is_file():
        return {}
    data = read_object(config, advice="restore it").get("data", {})
    return dict(data.get("columns") or {})


def kind_of(description: Mapping[str, Any]) -> Kind:
    """Which kind of model a description is of. One that LoopOS did not write is taken to say text."""
    if ENSEMBLE in description:
        return "ensemble"
    if description.get("task") == REWARD_TASK:
        return "reward"
    return "head" if "pooling" in description else "language"
