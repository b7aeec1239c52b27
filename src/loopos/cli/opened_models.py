"""What a model's place names, told without torch, and the language model there, opened.

Enters: the word MODEL of the command line. Leaves: which kind of model it is and what for, or a `Reasoner`. Left out:
opening task models (`evaluation.predictor`) and reward models (`evaluation.reward_predictor`).
"""

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
"""The folder of the reward model's run in that of an rlhf run."""


def is_task_model(model_source: str) -> bool:
    """Whether a head says what the model's outputs mean. Raises `UserError` for a place that holds no model."""
    if description := described(model_source):
        return kind_of(description) != "language"
    refuse_checkpoint(Path(model_source))
    if Path(model_source).is_dir() and not any(
        (Path(model_source) / name).is_file() for name in ("config.json", "model/config.json", ADAPTER_CONFIG)
    ):
        raise UserError(
            f"{model_source}: no trained model here; expected the output_dir of a finished run, or a model's folder"
        )
    source = weights_source(model_source, looks_up=False)
    if source.kind == "new":
        raise UserError(f'got "new", which has learned nothing; expected a trained model, such as "{EMBEDDED}"')
    return False


def require_language_model(source: str) -> None:
    """Raises `UserError` unless a language model may be there."""
    if not is_task_model(source):
        # A hub id: whether the hub is there.
        if not described(source):
            weights_source(source)
        return
    refuse_reward_model(source)
    raise UserError(
        f"{source}: a classifier or regressor; it cannot generate text. Use loopos predict and loopos evaluate"
    )


def refuse_reward_model(source: str) -> None:
    """Raises `UserError` where a reward model is: it has neither labels nor text. Any other place is left to whoever
    opens it.
    """
    if kind_of(described(source)) == "reward":
        raise UserError(
            f"{source}: a reward model, which scores responses; expected a model that predicts labels or says text. "
            f"Use it with: loopos score {source} FILE"
        )


def require_task_model(source: str) -> None:
    """Raises `UserError` unless a model with a head that predicts labels or values is there."""
    description = described(source)
    if not description and (source == EMBEDDED or not Path(source).exists()):
        raise UserError(
            f"{source}: a base model without a head, which has learned no labels; train it first, with "
            f'"pretrained_weights": "{source}" and "method": "fine_tuning" in a config: loopos train CONFIG'
            if source == EMBEDDED or is_hub_id(source)
            else f"{source}: no such folder; expected the output_dir of a finished run, or its folder model/"
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
    """Raises `UserError` unless a reward model is there."""
    description = read_description(model_folder(source))
    kind = kind_of(description)
    if kind == "reward":
        return
    is_head = kind != "language"
    what = f"a model of task {description.get('task')}" if is_head else "a language model"
    use = "loopos predict and loopos evaluate" if is_head else "loopos generate and loopos chat"
    beside = Path(source) / REWARD_RUN
    there = f"; the reward model of this run is {beside}" if (beside / "model" / MODEL_DESCRIPTION).is_file() else ""
    raise UserError(
        f'{source}: {what}, which scores no responses; expected a reward model, trained with "method": "reward_model"'
        f"{there or f' (this one is for {use})'}"
    )


def use_of(source: str) -> str:
    """What the trained model in a folder is for, as a command. Raises `UserError`."""
    description = read_description(model_folder(source))
    kind = kind_of(description)
    if kind == "reward":
        return f"score with it: loopos score {source} FILE"
    if kind != "language":
        return f"predict with it: loopos predict {source} INPUT"
    # A policy answers; what was trained on chains reasons in steps.
    steps = "" if description.get("method") == "ppo" else " --steps"
    return f'ask it: loopos generate {source} -p "..."{steps}'


def open_reasoner(
    source: str,
    *,
    device: str,
    precision: str,
    max_rows: int = 64,
    trust_remote_code: bool = False,
    may_vote: bool = False,
) -> Reasoner:
    """The language model, ready to generate; imports torch. may_vote: an ensemble that votes over answers will do.
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
