"""The kind of model at a path or id, determined without torch; and opening a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopos.config.diagnostics import UserError
from loopos.config.paths import MODEL_DESCRIPTION, is_hub_id
from loopos.models.ensemble_recipe import read_ensemble, refuse_votes
from loopos.models.model_folder import described, kind_of, model_folder, read_description, refuse_checkpoint
from loopos.models.resolve import ADAPTER_CONFIG, EMBEDDED, weights_source

if TYPE_CHECKING:
    from loopos.evaluation.reasoning import Reasoner

REWARD_RUN = "reward_model"
"""Folder of the reward-model run inside the folder of an rlhf run."""


def is_task_model(model_source: str) -> bool:
    """Whether the model has a head (no language model). Raises `UserError` if there is no model at the path or id."""
    if description := described(model_source):
        return kind_of(description) != "language"
    refuse_checkpoint(Path(model_source))
    if Path(model_source).is_dir() and not any(
        (Path(model_source) / name).is_file() for name in ("config.json", "model/config.json", ADAPTER_CONFIG)
    ):
        raise UserError(
            f"{model_source}: no trained model here; expected the output_dir of a finished run, or a model folder"
        )
    source = weights_source(model_source, looks_up=False)
    if source.kind == "new":
        raise UserError(f'got "new", an untrained model; expected a trained model, for example "{EMBEDDED}"')
    return False


def require_language_model(source: str) -> None:
    """Raises `UserError` unless `source` may be a language model."""
    if not is_task_model(source):
        # A hub id: check that it exists.
        if not described(source):
            weights_source(source)
        return
    refuse_reward_model(source)
    raise UserError(
        f"{source}: a classifier or regressor; it cannot generate text. Use loopos predict or loopos evaluate"
    )


def refuse_reward_model(source: str) -> None:
    """Raises `UserError` for a reward model, which predicts neither labels nor text. Other sources are checked when
    they are opened.
    """
    if kind_of(described(source)) == "reward":
        raise UserError(
            f"{source}: a reward model, which scores responses; expected a model that predicts labels or "
            f"generates text. Use: loopos score {source} FILE"
        )


def require_task_model(source: str) -> None:
    """Raises `UserError` unless `source` is a model with a head that predicts labels or values."""
    description = described(source)
    if not description and (source == EMBEDDED or not Path(source).exists()):
        raise UserError(
            f"{source}: a base model without a trained head; train it first, with "
            f'"pretrained_weights": "{source}" and "method": "fine_tuning" in a config: loopos train CONFIG'
            if source == EMBEDDED or is_hub_id(source)
            else f"{source}: no such folder; expected the output_dir of a finished run, or its model/ folder"
        )
    description = read_description(model_folder(source))
    kind = kind_of(description)
    if kind == "reward":
        refuse_reward_model(source)
    if kind == "language":
        raise UserError(
            f"{source}: a language model, which predicts no labels; use loopos generate, loopos chat or loopos evaluate"
        )


def require_reward_model(source: str) -> None:
    """Raises `UserError` unless `source` is a reward model."""
    description = read_description(model_folder(source))
    kind = kind_of(description)
    if kind == "reward":
        return
    is_head = kind != "language"
    what = f"a model of task {description.get('task')}" if is_head else "a language model"
    use = "loopos predict and loopos evaluate" if is_head else "loopos generate and loopos chat"
    beside = Path(source) / REWARD_RUN
    hint = f"; the reward model of this run is {beside}" if (beside / "model" / MODEL_DESCRIPTION).is_file() else ""
    raise UserError(
        f'{source}: {what}, which scores no responses; expected a reward model, trained with "method": "reward_model"'
        f"{hint or f' (use {use} for this model)'}"
    )


def use_of(source: str) -> str:
    """The command that uses the trained model in a folder. Raises `UserError`."""
    description = read_description(model_folder(source))
    kind = kind_of(description)
    if kind == "reward":
        return f"score with it: loopos score {source} FILE"
    if kind != "language":
        return f"predict with it: loopos predict {source} INPUT"
    steps = " --steps" if description.get("method") == "chain_of_thought" else ""
    return f'generate with it: loopos generate {source} -p "..."{steps}'


def open_reasoner(
    source: str,
    *,
    device: str,
    precision: str,
    max_rows: int = 64,
    trust_remote_code: bool = False,
    may_vote: bool = False,
) -> Reasoner:
    """Opens a language model for generation; imports torch. may_vote: accept an ensemble that votes over answers.
    Raises `UserError`.
    """
    if not may_vote:
        refuse_votes(source, read_ensemble(source))
    from loopos.evaluation.reasoning import Reasoner
    from loopos.training.precision import pick_device

    return Reasoner.open(
        source,
        device=pick_device(device).type,
        precision=None if precision == "auto" else precision,
        max_rows=max_rows,
        trust_remote_code=trust_remote_code,
    )
