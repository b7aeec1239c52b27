"""A rollout worker, wherever it runs: the policy's model, loaded once, weights taken as they come, orders answered.

Enters: what the model is made of, weights as bytes of a safetensors file, orders. Leaves: completions with their
log-probabilities. Left out: how orders get here (`ray_transport.py`), vLLM (`vllm_writer.py`).

vLLM as a rollout worker's writer, on CUDA.

Enters: the model's place, full weights, requests. Leaves: completions. Written to vLLM's documented interface (`LLM`,
`worker_extension_cls`, `collective_rpc`, `logprobs_mode`). Left out: adapters, which the config refuses with it. Its
seeds are its own: the texts are not those of the engine here.
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
from loopos.config.sections import LoraSection
from loopos.generation.completions import Completion, FinishReason
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingSettings
from loopos.models.adapters import ADAPTER, add_lora
from loopos.models.backbone import headless
from loopos.models.load import NUMBER_FORMATS, Sizes, cast_parameters, load_pretrained
from loopos.rl.workers.protocol import Order, Request
from loopos.storage.tensor_files import safetensors_chunks


@dataclass(frozen=True, kw_only=True)
class WorkerRecipe:
    """What a worker makes the policy's model of. `writer`: what generates. `lora`: the adapter over it, if the policy
    trains as one; the weights under it must then be those of `fingerprint`, as the adapter alone is sent.
    `max_length`: the most tokens of a prompt with its response, None where the model's positions alone bound it.
    `logprobs_mode`: vLLM's name of the log-probabilities to tell.
    """

    writer: Literal["ray", "vllm"]
    pretrained_weights: str
    sizes: Sizes
    tokenizer: str | None
    trust_remote_code: bool
    fingerprint: str
    lora: LoraSection | None
    number_format: Literal["bf16", "fp32"]
    on_gpu: bool
    max_length: int | None = None
    logprobs_mode: str = "processed_logprobs"


class Writer(Protocol):
    """A model that takes weights and writes."""

    def take(self, weights: Mapping[str, Tensor]) -> None: ...

    def write(self, request: Request) -> list[Completion]: ...


class RolloutWorker:
    """Holds the weights of one version at a time. Raises `UserError` for a model that cannot be loaded here."""

    def __init__(self, recipe: WorkerRecipe) -> None:
        self._writer = _writer_of(recipe)
        self._version: int | None = None

    def write(self, order: Order, fetch: Callable[[], bytes]) -> list[Completion]:
        """The order's completions. fetch: gives the weights of its version, asked only where they are not held."""
        if order.version != self._version:
            self._version = None
            self._writer.take(load(fetch()))
            self._version = order.version
        return self._writer.write(order.request)


def policy_weights(causal: PreTrainedModel, *, adapter_alone: bool) -> dict[str, Tensor]:
    """Name → what a worker needs to write as this model does: every parameter, or those of its adapter."""
    return {
        name: parameter.detach()
        for name, parameter in causal.named_parameters()
        if not adapter_alone or (".lora_" in name and f".{ADAPTER}." in name)
    }


def packed(weights: Mapping[str, Tensor]) -> bytes:
    """Weights as the bytes of a safetensors file."""
    return b"".join(bytes(piece) for piece in safetensors_chunks({n: w.cpu() for n, w in weights.items()}))


def _writer_of(recipe: WorkerRecipe) -> Writer:
    if recipe.writer == "vllm":
        return VllmWriter(recipe)
    return EngineWriter(recipe)


class EngineWriter:
    """The engine that generates where training runs, over weights of its own."""

    def __init__(self, recipe: WorkerRecipe) -> None:
        pretrained = load_pretrained(
            recipe.pretrained_weights,
            causal=True,
            sizes=recipe.sizes,
            tokenizer=recipe.tokenizer,
            trust_remote_code=recipe.trust_remote_code,
        )
        causal = pretrained.model
        if recipe.lora is not None:
            if pretrained.fingerprint != recipe.fingerprint:
                raise UserError(
                    f"a rollout worker finds other weights under {recipe.pretrained_weights} than the run: expected "
                    "the same ones on every host"
                )
            causal.requires_grad_(False)
            add_lora(headless(causal), recipe.lora, seed=0)
        cast_parameters(causal, NUMBER_FORMATS[recipe.number_format])
        if recipe.on_gpu:
            causal.to("cuda")  # type: ignore[arg-type]  # transformers' stub wants the model itself
        self._parameters = dict(causal.named_parameters())
        self._engine = Engine(causal, pretrained.tokenizer)

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """In place: the engine looks at the model's own parameters."""
        for name, tensor in weights.items():
            self._parameters[name].copy_(tensor)

    def write(self, request: Request) -> list[Completion]:
        return self._engine.generate(request.prompts, request.settings, n=request.n)


class TakesWeights:
    """What vLLM adds to its own worker, which has `model_runner`."""

    model_runner: Any

    def take_weights(self, weights: bytes) -> None:
        """The tensors of a safetensors file, under transformers' names."""
        self.model_runner.model.load_weights(weights=list(load(weights).items()))


class VllmWriter:
    """One `vllm.LLM`. Raises `MissingRequirement` without vLLM or without CUDA."""

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
        # What was computed with the weights before is of no use.
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


def _sampling(settings: SamplingSettings, n: int) -> Any:
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
    """One `CompletionOutput`; `stop_reason` is the string or token that ended it, None for the model's end token."""
    tokens = list(output.token_ids)
    logprobs = [place[token].logprob for place, token in zip(output.logprobs, tokens, strict=True)]
    reason: FinishReason = "length"
    if output.finish_reason == "stop":
        reason = "stop string" if isinstance(output.stop_reason, str) else "stop token"
    return Completion(index, sample, tokens, output.text, logprobs, None, (), reason)
