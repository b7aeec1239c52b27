"""From the section `rollout` to what writes the responses of a run.

Enters: a config's sections, the policy's model, the process's place among those that train. Leaves: a `LocalRollouts`
or a `RemoteRollouts`. Left out: both of them.
"""

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
from loopos.config.sections import LoraSection
from loopos.generation.engine import Engine
from loopos.models.load import Pretrained, Sizes
from loopos.rl.workers.dispatch import Dispatcher
from loopos.rl.workers.protocol import LocalRollouts, Request
from loopos.rl.workers.ray_transport import RayTransport
from loopos.rl.workers.remote import RemoteRollouts
from loopos.rl.workers.worker import WorkerRecipe, packed, policy_weights


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process among those that train. `share`: (rank, ranks); `gather(value)`: the values of all ranks."""

    share: tuple[int, int]
    gather: Callable[[object], list[object]]


@dataclass(frozen=True)
class RunView:
    """What the writing of responses sees of a run: updates that the policy has had, how many iterations there are, and
    what each asks for.
    """

    step: Callable[[], int]
    iterations: Callable[[], int]
    asked: Callable[[int], Request]


@dataclass(frozen=True, kw_only=True)
class TrainedPolicy:
    """The policy in training, as `remote.Policy` wants it."""

    causal: PreTrainedModel
    adapter_alone: bool
    run: RunView

    def version(self) -> int:
        return self.run.step()

    def weights(self) -> bytes:
        return packed(policy_weights(self.causal, adapter_alone=self.adapter_alone))

    def request(self, iteration: int) -> Request | None:
        return self.run.asked(iteration) if iteration < self.run.iterations() else None


def check_installed(section: RolloutEngineSection) -> None:
    """Raises `MissingRequirement` where this host lacks what the engine needs; vLLM is needed by the workers."""
    if section.is_remote and find_spec("ray") is None:
        raise MissingRequirement(
            f'rollout.engine: "{section.engine}" needs Ray, which is not installed; take "local", or run\n'
            f"  {install_command('cluster')}"
        )
    if section.engine == "vllm" and section.address is None:
        # On a cluster the workers' hosts have both, not this one.
        if find_spec("vllm") is None:
            raise MissingRequirement('rollout.engine: got "vllm", which is not installed; expected: pip install vllm')
        if not torch.cuda.is_available():
            raise MissingRequirement('rollout.engine: got "vllm", but there is no CUDA device; expected one, or "ray"')


def open_rollouts(
    config: PpoConfig,
    pretrained: Pretrained,
    *,
    place: Place,
    run: RunView,
    say: Callable[[str], None],
    trust_remote_code: bool,
) -> LocalRollouts | RemoteRollouts:
    """What writes. pretrained: whose model is the policy by now. The first process starts the workers, and the others
    hear from it. Raises `MissingRequirement`.
    """
    section, causal, tokenizer = config.rollout, pretrained.model, pretrained.tokenizer
    if not section.is_remote:
        return LocalRollouts(Engine(causal, tokenizer), share=place.share)
    recipe = recipe_of(config, pretrained, trust_remote_code=trust_remote_code)
    dispatcher = None
    if place.share[0] == 0:
        transport = RayTransport(recipe, section)
        workers, restarts, timeout = section.workers, section.restarts, section.timeout
        dispatcher = Dispatcher(transport, workers=workers, restarts=restarts, timeout=timeout, say=say)
    return RemoteRollouts(
        dispatcher,
        TrainedPolicy(causal=causal, adapter_alone=recipe.lora is not None, run=run),
        tokenizer,
        f"generation: {section.workers} workers of Ray"
        + (" with vLLM" if section.engine == "vllm" else "")
        + (f", up to {section.max_staleness} iterations behind" if section.max_staleness else ""),
        max_staleness=section.max_staleness,
        share=place.share,
        gather=place.gather,
    )


def recipe_of(config: PpoConfig, pretrained: Pretrained, *, trust_remote_code: bool) -> WorkerRecipe:
    """What a worker makes its model of. Places on this machine are told in full: a worker may start elsewhere."""
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
        lora=(training.lora or LoraSection()) if training.trainable == "lora" else None,
        number_format="bf16" if is_half else "fp32",
        on_gpu=config.rollout.gpus > 0,
        max_length=training.max_length,
        logprobs_mode="raw_logprobs" if filters else "processed_logprobs",
    )


def _in_full(source: str) -> str:
    return os.path.abspath(source) if os.path.exists(source) else source
