"""A rollout worker's LoopOS engine over its own copy of the weights.

Apart from `worker`, so that a worker with vLLM does not import models, adapters and environments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.data.templates import ChatTemplate
from loopos.generation.completions import Completion
from loopos.generation.engine import Engine
from loopos.models.adapters import train_adapters
from loopos.models.backbone import headless
from loopos.models.load import NUMBER_FORMATS, cast_parameters, load_pretrained
from loopos.rl.episodes import EpisodePlayer
from loopos.rl.workers.protocol import Request, answers_of
from loopos.rl.workers.recipes import EngineRecipe


class EngineWriter:
    """LoopOS's engine with its own copy of the weights."""

    def __init__(self, recipe: EngineRecipe) -> None:
        pretrained = load_pretrained(
            recipe.pretrained_weights,
            causal=True,
            sizes=recipe.sizes,
            tokenizer=recipe.tokenizer,
            trust_remote_code=recipe.trust_remote_code,
            adapter=recipe.adapter,
        )
        causal = pretrained.model
        if recipe.training is not None:
            if pretrained.fingerprint != recipe.fingerprint:
                raise UserError(
                    f"a rollout worker found other weights under {recipe.pretrained_weights} than the run; expected "
                    "the same ones on every host"
                )
            causal.requires_grad_(False)
            train_adapters(headless(causal), recipe.training, recipe.adapter)
        cast_parameters(causal, NUMBER_FORMATS[recipe.number_format])
        if recipe.gpus > 0:
            causal.to("cuda")  # type: ignore[arg-type]  # transformers' stub wants the model itself
        self._parameters = dict(causal.named_parameters())
        self._engine = Engine(causal, pretrained.tokenizer)
        self._player: EpisodePlayer | None = None
        if recipe.environment is not None:
            template = ChatTemplate(pretrained.tokenizer, recipe.chat_template)
            self._player = EpisodePlayer(self._engine, template, recipe.environment)

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copies into the model's own parameters, which the engine reads."""
        for name, tensor in weights.items():
            self._parameters[name].copy_(tensor)

    def write(self, request: Request) -> list[Completion]:
        return answers_of(self._engine, self._player, request)
