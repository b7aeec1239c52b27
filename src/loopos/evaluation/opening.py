"""Opens a trained model of any kind, as its folder describes it. Apart from the three kinds, which do not know each
other.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from loopos.config.diagnostics import UserError
from loopos.evaluation.predictor import EnsemblePredictor, Predictor, open_predictor
from loopos.evaluation.reasoning import Reasoner
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.models.resolve import ModelRef, resolve_trained

Kind: TypeAlias = Literal["head", "language", "reward"]
Opened: TypeAlias = Predictor | EnsemblePredictor | RewardPredictor | Reasoner
_USES = {"head": "predict", "language": "generate", "reward": "score_texts"}


def open_model(source: str | ModelRef, kind: Kind | None = None, *, device: str = "cpu") -> Opened:
    """Opens the model that a name refers to. kind: the only accepted kind. Raises `UserError` if there is no model, or
    one of another kind.
    """
    if kind is not None and kind not in _USES:
        raise UserError(f"kind: got {kind!r}; expected one of {', '.join(_USES)}")
    ref = resolve_trained(source)
    found: Kind = "head" if ref.kind == "ensemble" else ref.kind
    if kind is not None and found != kind:
        raise UserError(f'{ref.name}: got a model of kind "{found}", which has {_USES[found]}(); expected "{kind}"')
    if found == "head":
        return open_predictor(ref, device=device)
    if found == "reward":
        return RewardPredictor.open(ref, device=device)
    return Reasoner.open(ref, device=device)
