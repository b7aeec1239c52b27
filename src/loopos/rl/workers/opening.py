"""Creates the rollout engine for the section `rollout`: `LocalRollouts`, or `RemoteRollouts` on Ray workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from loopos.config.diagnostics import MissingRequirement
from loopos.config.extras import install_command
from loopos.config.ppo import PpoConfig
from loopos.config.rl import RolloutEngineSection
from loopos.data.templates import ChatTemplate
from loopos.generation.engine import Engine
from loopos.models.load import Pretrained, Sizes
from loopos.rl.episodes import EpisodePlayer
from loopos.rl.workers.dispatch import Dispatcher
from loopos.rl.workers.protocol import LocalRollouts, Request
from loopos.rl.workers.ray_transport import RayTransport
from loopos.rl.workers.remote import RemoteRollouts
from loopos.rl.workers.worker import WorkerRecipe, packed, policy_weights


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """The data-parallel group of a process. `rank_and_size`: of this process; `gather(value)`: the values of all
    ranks.
    """

    rank_and_size: tuple[int, int]
    gather: Callable[[object], list[object]]


@dataclass(frozen=True)
class RunView:
    """What rollouts need to know of a run: the number of updates so far, the number of iterations, and each iteration's
    request.
    """

    step: Callable[[], int]
    iterations: Callable[[], int]
    request_for: Callable[[int], Request]


@dataclass(frozen=True, kw_only=True)
class TrainedPolicy:
    """The policy in training, as `remote.Policy`."""

    causal: PreTrainedModel
    adapter_only: bool
    run: RunView

    def version(self) -> int:
        return self.run.step()

    def weights(self) -> bytes:
        return packed(policy_weights(self.causal, adapter_only=self.adapter_only))

    def request(self, iteration: int) -> Request | None:
        return self.run.request_for(iteration) if iteration < self.run.iterations() else None


def check_installed(section: RolloutEngineSection) -> None:
    """Raises `MissingRequirement` if this host lacks what the engine needs. With a cluster, only the workers need
    vLLM.
    """
    if section.is_remote and find_spec("ray") is None:
        raise MissingRequirement(
            f'rollout.engine: "{section.engine}" needs Ray, which is not installed; take "local", or run\n'
            f"  {install_command('cluster')}"
        )
    if section.engine == "vllm" and section.address is None:
        # On a cluster only the workers' hosts need both.
        if find_spec("vllm") is None:
            raise MissingRequirement('rollout.engine: got "vllm", which is not installed; expected: pip install vllm')
        if not torch.cuda.is_available():
            raise MissingRequirement('rollout.engine: got "vllm", but there is no CUDA device; expected one, or "ray"')


def open_rollouts(
    config: PpoConfig,
    pretrained: Pretrained,
    *,
    data_parallel: DataParallel,
    run: RunView,
    say: Callable[[str], None],
    trust_remote_code: bool,
    template: ChatTemplate | None = None,
) -> LocalRollouts | RemoteRollouts:
    """The rollout engine. pretrained: its model is the policy. Rank 0 starts the workers; the other ranks receive
    results from it. template: of an environment's messages. Raises `MissingRequirement`, and `UserError` for an
    environment that the template cannot write.
    """
    section, causal, tokenizer = config.rollout, pretrained.model, pretrained.tokenizer
    if not section.is_remote:
        engine = Engine(causal, tokenizer)
        player = None
        if config.environment is not None:
            assert template is not None, "an environment has a template"
            player = EpisodePlayer(engine, template, config.environment)
        return LocalRollouts(engine, player=player, data_parallel=data_parallel.rank_and_size)
    recipe = recipe_of(config, pretrained, trust_remote_code=trust_remote_code)
    dispatcher = None
    if data_parallel.rank_and_size[0] == 0:
        transport = RayTransport(recipe, section)
        workers, restarts, timeout = section.workers, section.restarts, section.timeout
        dispatcher = Dispatcher(transport, workers=workers, restarts=restarts, timeout=timeout, say=say)
    return RemoteRollouts(
        dispatcher,
        TrainedPolicy(causal=causal, adapter_only=recipe.training is not None, run=run),
        tokenizer,
        f"generation: {section.workers} workers of Ray"
        + (" with vLLM" if section.engine == "vllm" else "")
        + (f", up to {section.max_staleness} iterations behind" if section.max_staleness else ""),
        max_staleness=section.max_staleness,
        data_parallel=data_parallel.rank_and_size,
        gather=data_parallel.gather,
    )


def recipe_of(config: PpoConfig, pretrained: Pretrained, *, trust_remote_code: bool) -> WorkerRecipe:
    """What a worker needs to build its model. Local paths are absolute, because a worker may start in another
    folder.
    """
    data, training, generation = config.data, config.training, config.generation
    is_half = pretrained.model.dtype is torch.bfloat16
    filters = generation.top_k is not None or generation.top_p < 1
    return WorkerRecipe(
        writer="vllm" if config.rollout.engine == "vllm" else "ray",
        pretrained_weights=_in_full(data.pretrained_weights),
        sizes=Sizes.of(config.model, max_length=training.max_length),
        tokenizer=data.tokenizer and _in_full(data.tokenizer),
        trust_remote_code=trust_remote_code,
        fingerprint=pretrained.fingerprint,
        training=training if training.trainable == "lora" else None,
        adapter=data.adapter and _in_full(data.adapter),
        number_format="bf16" if is_half else "fp32",
        on_gpu=config.rollout.gpus > 0,
        max_length=training.max_length,
        logprobs_mode="raw_logprobs" if filters else "processed_logprobs",
        environment=config.environment,
        chat_template="auto" if data.chat_template == "none" else _in_full(data.chat_template),
    )


def _in_full(source: str) -> str:
    return os.path.abspath(source) if os.path.exists(source) else source
