"""A rollout worker: loads the policy's model once, receives new weights, and answers orders with LoopOS's engine or
vLLM.

The vLLM writer needs CUDA and uses vLLM's documented interface (`LLM`, `worker_extension_cls`, `collective_rpc`,
`logprobs_mode`). It has no adapters (the config refuses them) and its own random numbers: its texts differ from those
of LoopOS's engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.environments import EnvironmentSection
from loopos.config.sections import TrainingSection
from loopos.data.templates import ChatTemplate
from loopos.generation.completions import Completion, FinishReason
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.models.active_adapters import ADAPTER
from loopos.models.adapters import train_adapters
from loopos.models.backbone import headless
from loopos.models.load import NUMBER_FORMATS, Sizes, cast_parameters, load_pretrained
from loopos.rl.episodes import EpisodePlayer
from loopos.rl.workers.protocol import Order, Request, answers_of
from loopos.storage.tensor_files import safetensors_chunks


@dataclass(frozen=True, kw_only=True)
class WorkerRecipe:
    """What a worker needs to build the policy's model. `writer`: the generation engine. `training`: how the
    policy's adapters are made, if it trains as some; their base must have this `fingerprint`, because only the adapters
    are sent. `adapter`: the folder of those that train on. `max_length`: maximum tokens of prompt and response, None
    for the model's own limit. `logprobs_mode`: vLLM's name of the returned log-probabilities. `environment`: what the
    policy plays, under `chat_template`.
    """

    writer: Literal["ray", "vllm"]
    pretrained_weights: str
    sizes: Sizes
    tokenizer: str | None
    trust_remote_code: bool
    fingerprint: str
    training: TrainingSection | None
    adapter: str | None
    number_format: Literal["bf16", "fp32"]
    on_gpu: bool
    max_length: int | None = None
    logprobs_mode: str = "processed_logprobs"
    environment: EnvironmentSection | None = None
    chat_template: str = "auto"


class Writer(Protocol):
    """A model that receives weights and generates."""

    def take(self, weights: Mapping[str, Tensor]) -> None: ...

    def write(self, request: Request) -> list[Completion]: ...


class RolloutWorker:
    """Stores the weights of one version at a time. Raises `UserError` for a model that cannot be loaded on this
    host.
    """

    def __init__(self, recipe: WorkerRecipe) -> None:
        self._writer = _writer_of(recipe)
        self._version: int | None = None

    def write(self, order: Order, fetch: Callable[[], bytes]) -> list[Completion]:
        """The order's completions. fetch: returns the weights of its version; called only for a new version."""
        if order.version != self._version:
            self._version = None
            self._writer.take(load(fetch()))
            self._version = order.version
        return self._writer.write(order.request)


def policy_weights(causal: PreTrainedModel, *, adapter_only: bool) -> dict[str, Tensor]:
    """Name → tensor that a worker needs to generate like this model: all parameters, or only those of the adapter."""
    return {
        name: parameter.detach()
        for name, parameter in causal.named_parameters()
        if not adapter_only or (".lora_" in name and f".{ADAPTER}." in name)
    }


def packed(weights: Mapping[str, Tensor]) -> bytes:
    """Weights as the bytes of a safetensors file."""
    return b"".join(bytes(chunk) for chunk in safetensors_chunks({n: w.cpu() for n, w in weights.items()}))


def _writer_of(recipe: WorkerRecipe) -> Writer:
    if recipe.writer == "vllm":
        return VllmWriter(recipe)
    return EngineWriter(recipe)


class EngineWriter:
    """LoopOS's engine with its own copy of the weights."""

    def __init__(self, recipe: WorkerRecipe) -> None:
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
        if recipe.on_gpu:
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


class TakesWeights:
    """Extension of vLLM's worker class, which has `model_runner`."""

    model_runner: Any

    def take_weights(self, weights: bytes) -> None:
        """Loads the tensors of a safetensors file, under transformers' names."""
        self.model_runner.model.load_weights(weights=list(load(weights).items()))


class VllmWriter:
    """One `vllm.LLM`. Raises `MissingRequirement` without vLLM or CUDA."""

    def __init__(self, recipe: WorkerRecipe) -> None:
        if not torch.cuda.is_available():
            raise MissingRequirement('rollout.engine: got "vllm" on a worker without CUDA; expected a GPU, or "ray"')
        try:
            from vllm import LLM
        except ImportError as problem:
            raise MissingRequirement(f"rollout.engine: vLLM cannot be imported on a worker: {problem}") from problem
        self._model = LLM(
            model=recipe.pretrained_weights,
            tokenizer=recipe.tokenizer or recipe.pretrained_weights,
            trust_remote_code=recipe.trust_remote_code,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[recipe.number_format],
            max_model_len=recipe.max_length,
            logprobs_mode=recipe.logprobs_mode,
            worker_extension_cls=f"{TakesWeights.__module__}.{TakesWeights.__name__}",
        )

    def take(self, weights: Mapping[str, Tensor]) -> None:
        self._model.collective_rpc("take_weights", args=(packed(weights),))
        # Cached prefixes belong to the old weights.
        self._model.reset_prefix_cache()

    def write(self, request: Request) -> list[Completion]:
        prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
        sampling = [_sampling(settings, request.n) for settings in request.settings]
        answers = self._model.generate(prompts, sampling, use_tqdm=False)
        return [
            _completion(index, sample, output)
            for index, answer in enumerate(answers)
            for sample, output in enumerate(answer.outputs)
        ]


def _sampling(settings: SamplingParams, n: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        n=n,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_tokens=settings.max_new_tokens,
        stop=list(settings.stop) or None,
        include_stop_str_in_output=settings.keep_stop,
        stop_token_ids=list(settings.stop_token_ids) or None,
        seed=settings.seed,
        logprobs=0,
    )


def _completion(index: int, sample: int, output: Any) -> Completion:
    """One `CompletionOutput`. `stop_reason` is the stop string or token, None for the model's end token."""
    tokens = list(output.token_ids)
    logprobs = [candidates[token].logprob for candidates, token in zip(output.logprobs, tokens, strict=True)]
    reason: FinishReason = "length"
    if output.finish_reason == "stop":
        reason = "stop string" if isinstance(output.stop_reason, str) else "stop"
    return Completion(index, sample, tokens, output.text, logprobs, None, (), reason)
