"""What a model's place names, told without torch, and the language model there, opened.

Enters: the word MODEL of the command line. Leaves: whether it is a task model, or a `Reasoner`. Left out: task models
(`evaluation.predictor`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopos.config.faults import FaultsError, UserError
from loopos.models.model_folder import DESCRIPTION, model_folder, read_description
from loopos.models.sources import EMBEDDED, weights_source

if TYPE_CHECKING:
    from loopos.evaluation.reasoning import Reasoner

# What checks name whose words come from a config; here they come from the command line.
_FIELDS = {"data.pretrained_weights: ": "", "training.device: ": "--device: "}


def is_task_model(place: str) -> bool:
    """Whether a head says what the model's outputs mean. Raises `UserError` for a place that holds no model."""
    if any((Path(place) / name).is_file() for name in (DESCRIPTION, f"model/{DESCRIPTION}", "events.jsonl")):
        return "pooling" in read_description(model_folder(place))
    if Path(place).is_dir() and not any(
        (Path(place) / name).is_file() for name in ("config.json", "model/config.json")
    ):
        raise UserError(f"{place}: no trained model here; wanted the output_dir of a finished run, or a model's folder")
    try:
        source = weights_source(place)
    except UserError as error:
        raise _in_our_words(error) from error
    if source.kind == "new":
        raise UserError(f'given "new", which has learned nothing; wanted a trained model, such as "{EMBEDDED}"')
    return False


def require_language_model(place: str) -> None:
    """Raises `UserError` unless a language model may be there."""
    if is_task_model(place):
        raise UserError(f"{place}: a model with a head, which says no text; use loopos predict and loopos evaluate")


def open_reasoner(
    place: str, *, device: str, precision: str, max_rows: int = 64, trust_remote_code: bool = False
) -> Reasoner:
    """The language model, ready to generate; imports torch. Raises `UserError`."""
    from loopos.evaluation.reasoning import Reasoner
    from loopos.training.precision import pick_device

    try:
        return Reasoner.open(
            place,
            device=pick_device(device).type,
            precision=None if precision == "auto" else precision,
            max_rows=max_rows,
            trust_remote_code=trust_remote_code,
        )
    except UserError as error:
        raise _in_our_words(error) from error


def _in_our_words(error: UserError) -> UserError:
    """The error without the names of a config's keys."""
    if isinstance(error, FaultsError):
        return error
    text = str(error)
    for theirs, ours in _FIELDS.items():
        if text.startswith(theirs):
            text = ours + text.removeprefix(theirs)
    return type(error)(text)
