"""Opens a trained model of any kind, as its folder describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from loopos.config.diagnostics import UserError
from loopos.config.paths import is_hub_id
from loopos.evaluation.predictor import EnsemblePredictor, Predictor, open_predictor
from loopos.evaluation.reasoning import Reasoner
from loopos.evaluation.reward_predictor import RewardPredictor
from loopos.models.model_folder import described, kind_of, model_folder
from loopos.models.resolve import ADAPTER_CONFIG, EMBEDDED

Kind: TypeAlias = Literal["head", "language", "reward"]
Opened: TypeAlias = Predictor | EnsemblePredictor | RewardPredictor | Reasoner
_USES = {"head": "predict", "language": "generate", "reward": "score_texts"}


def open_model(source: str, kind: Kind | None = None, *, device: str = "cpu") -> Opened:
    """Opens the model at a path or id. kind: the only accepted kind. Raises `UserError` if there is no model, or one of
    another kind.
    """
    found = _kind_at(source)
    if kind is not None and kind not in _USES:
        raise UserError(f"kind: got {kind!r}; expected one of {', '.join(_USES)}")
    if kind is not None and found != kind:
        raise UserError(f'{source}: got a model of kind "{found}", which has {_USES[found]}(); expected "{kind}"')
    if found == "head":
        return open_predictor(source, device=device)
    if found == "reward":
        return RewardPredictor.open(source, device=device)
    return Reasoner.open(source, device=device)


def _kind_at(source: str) -> Kind:
    description = described(source)
    if description:
        found = kind_of(description)
        return "head" if found == "ensemble" else found
    names = ("config.json", "model/config.json", ADAPTER_CONFIG)
    is_model = source == EMBEDDED or Path(source).is_file() or any((Path(source) / name).is_file() for name in names)
    if not is_model and not is_hub_id(source):
        model_folder(source)  # raises an error that names what is missing
    return "language"
