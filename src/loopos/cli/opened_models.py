"""What a command accepts as its MODEL, checked without torch; and opening a language model.

Every function takes a name or what `resolve` returned for it, and so resolves a name at most once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loopos.config.diagnostics import UserError
from loopos.config.paths import MODEL_DESCRIPTION, is_hub_id
from loopos.models.resolve import EMBEDDED, ModelRef, refuse_votes, require_reachable, resolve_trained

if TYPE_CHECKING:
    from loopos.evaluation.reasoning import Reasoner

REWARD_RUN = "reward_model"
"""Folder of the reward-model run inside the folder of an rlhf run."""


def is_task_model(source: str | ModelRef) -> bool:
    """Whether the model has a head (no language model). Raises `UserError` if there is no model."""
    return resolve_trained(source).kind != "language"


def require_language_model(source: str | ModelRef) -> ModelRef:
    """The language model, or what may be one. Raises `UserError` for other models, and an unreachable hub."""
    ref = resolve_trained(source)
    require_reachable(ref)
    if ref.kind != "language":
        refuse_reward_model(ref)
        raise UserError(
            f"{ref.name}: a classifier or regressor; it cannot generate text. Use loopos predict or loopos evaluate"
        )
    return ref


def refuse_reward_model(source: str | ModelRef) -> None:
    """Raises `UserError` for a reward model, which predicts neither labels nor text."""
    ref = resolve_trained(source)
    if ref.kind == "reward":
        raise UserError(
            f"{ref.name}: a reward model, which scores responses; expected a model that predicts labels or "
            f"generates text. Use: loopos score {ref.name} FILE"
        )


def require_task_model(source: str | ModelRef) -> ModelRef:
    """The model with a head that predicts labels or values. Raises `UserError` for other models."""
    if isinstance(source, str) and (source == EMBEDDED or not Path(source).exists()):
        raise UserError(
            f"{source}: a base model without a trained head; train it first, with "
            f'"pretrained_weights": "{source}" and "method": "fine_tuning" in a config: loopos train CONFIG'
            if source == EMBEDDED or is_hub_id(source)
            else f"{source}: no such folder; expected the output_dir of a finished run, or its model/ folder"
        )
    ref = resolve_trained(source)
    refuse_reward_model(ref)
    if ref.kind == "language":
        raise UserError(
            f"{ref.name}: a language model, which predicts no labels; use loopos generate, loopos chat or loopos "
            "evaluate"
        )
    return ref


def require_reward_model(source: str | ModelRef) -> ModelRef:
    """The reward model. Raises `UserError` for other models."""
    ref = resolve_trained(source)
    if ref.kind == "reward":
        return ref
    is_head = ref.kind != "language"
    what = f"a model of task {ref.description.get('task')}" if is_head else "a language model"
    use = "loopos predict and loopos evaluate" if is_head else "loopos generate and loopos chat"
    beside = Path(ref.name) / REWARD_RUN
    hint = f"; the reward model of this run is {beside}" if (beside / "model" / MODEL_DESCRIPTION).is_file() else ""
    raise UserError(
        f'{ref.name}: {what}, which scores no responses; expected a reward model, trained with "method": "reward_model"'
        f"{hint or f' (use {use} for this model)'}"
    )


def use_of(source: str | ModelRef) -> str:
    """The command that uses the trained model in a folder. Raises `UserError`."""
    ref = resolve_trained(source)
    if ref.kind == "reward":
        return f"score with it: loopos score {ref.name} FILE"
    if ref.kind != "language":
        return f"predict with it: loopos predict {ref.name} INPUT"
    steps = " --steps" if ref.description.get("method") == "chain_of_thought" else ""
    return f'generate with it: loopos generate {ref.name} -p "..."{steps}'


def open_reasoner(
    source: str | ModelRef,
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
    ref = resolve_trained(source)
    if not may_vote:
        refuse_votes(ref)
    from loopos.evaluation.reasoning import Reasoner
    from loopos.training.precision import pick_device

    return Reasoner.open(
        ref,
        device=pick_device(device).type,
        precision=None if precision == "auto" else precision,
        max_rows=max_rows,
        trust_remote_code=trust_remote_code,
    )
