"""Creates the rollout engine for the section `rollout`: `LocalRollouts`, or `RemoteRollouts` on Ray workers."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from transformers import PreTrainedModel

from loopos.config.diagnostics import MissingRequirement
from loopos.config.extras import install_command
from loopos.config.ppo import PpoConfig
from loopos.config.rl import RolloutEngineSection
from loopos.data.templates import ChatTemplate
from loopos.generation.engine import Engine, end_tokens
from loopos.models.load import Pretrained, Sizes
from loopos.models.merged_weights import merged_weights
from loopos.rl.episodes import EpisodePlayer
from loopos.rl.workers.dispatch import Dispatcher
from loopos.rl.workers.interpreter import check_interpreter
from loopos.rl.workers.protocol import LocalRollouts, Request
from loopos.rl.workers.ray_transport import RayTransport
from loopos.rl.workers.recipes import EngineRecipe, VllmRecipe, WorkerRecipe
from loopos.rl.workers.remote import RemoteRollouts
from loopos.rl.workers.worker import packed, policy_weights
from loopos.storage.tensor_files import safetensors_chunks, stream_chunks


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
    """The policy in training, as `remote.Policy`. `recipe`: of the workers, which says what they need."""

    causal: PreTrainedModel
    recipe: WorkerRecipe
    run: RunView

    def version(self) -> int:
        return self.run.step()

    def weights(self) -> bytes:
        if isinstance(self.recipe, VllmRecipe):
            return packed(stream_chunks(*merged_weights(self.causal)))
        return packed(safetensors_chunks(policy_weights(self.causal, adapter_only=self.recipe.training is not None)))

    def request(self, iteration: int) -> Request | None:
        return self.run.request_for(iteration) if iteration < self.run.iterations() else None


def check_installed(section: RolloutEngineSection) -> None:
    """Raises `MissingRequirement` if this host lacks what the engine needs, and `UserError` for an interpreter that
    workers cannot use. On a cluster only the workers' hosts need vLLM.
    """
    if section.is_remote and find_spec("ray") is None:
        raise MissingRequirement(
            f'rollout.engine: "{section.engine}" needs Ray, which is not installed; take "local", or run\n'
            f"  {install_command('cluster')}"
        )
    if section.address is None and section.is_remote:
        check_interpreter(section.python, needs_vllm=section.engine == "vllm", on_gpu=gpus_of(section) > 0)


def gpus_of(section: RolloutEngineSection) -> float:
    """GPUs of a worker: with vLLM, if the config does not say, one on a cluster and where this host has CUDA."""
    if section.gpus_per_worker is not None:
        return section.gpus_per_worker
    has_gpus = section.address is not None or torch.cuda.is_available()
    return 1.0 if section.engine == "vllm" and has_gpus else 0.0


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
        TrainedPolicy(causal=causal, recipe=recipe, run=run),
        tokenizer,
        f"generation: {section.workers} workers of Ray"
        + (" with vLLM" if isinstance(recipe, VllmRecipe) else "")
        + (" on processors" if isinstance(recipe, VllmRecipe) and recipe.gpus == 0 else "")
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
    number_format: Literal["bf16", "fp32"] = "bf16" if pretrained.model.dtype is torch.bfloat16 else "fp32"
    gpus = gpus_of(config.rollout)
    if config.rollout.engine == "vllm":
        filters = generation.top_k is not None or generation.top_p < 1
        return VllmRecipe(
            files=_files_of(pretrained),
            trust_remote_code=trust_remote_code,
            end_tokens=tuple(sorted(end_tokens([pretrained.model], pretrained.tokenizer))),
            number_format=number_format,
            gpus=gpus,
            max_length=training.max_length,
            logprobs_mode="raw_logprobs" if filters else "processed_logprobs",
        )
    return EngineRecipe(
        pretrained_weights=_in_full(data.pretrained_weights),
        sizes=Sizes.of(config.model, max_length=training.max_length),
        tokenizer=data.tokenizer and _in_full(data.tokenizer),
        trust_remote_code=trust_remote_code,
        fingerprint=pretrained.fingerprint,
        training=training if training.trainable == "lora" else None,
        adapter=data.adapter and _in_full(data.adapter),
        number_format=number_format,
        gpus=gpus,
        environment=config.environment,
        chat_template="auto" if data.chat_template == "none" else _in_full(data.chat_template),
    )


def _files_of(pretrained: Pretrained) -> dict[str, bytes]:
    """Config and tokenizer as the files of a model's folder: the policy's own, wherever its weights came from."""
    config = copy.deepcopy(pretrained.model.config)
    config.architectures = [type(pretrained.model).__name__]
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        pretrained.tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def _in_full(source: str) -> str:
    return os.path.abspath(source) if os.path.exists(source) else source
