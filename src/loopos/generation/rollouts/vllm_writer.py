"""vLLM as a rollout worker's writer, on CUDA.

Enters: the model's place, full weights, requests. Leaves: completions. Written to vLLM's documented interface (`LLM`,
`worker_extension_cls`, `collective_rpc`, `logprobs_mode`). Left out: adapters, which the config refuses with it. Its
seeds are its own: the texts are not those of the engine here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from loopos.config.faults import EnvironmentFault
from loopos.generation.completions import Completion, FinishReason
from loopos.generation.rollouts.request import Request
from loopos.generation.rollouts.worker import WorkerRecipe, packed
from loopos.generation.settings import SamplingSettings


class TakesWeights:
    """What vLLM adds to its own worker, which has `model_runner`."""

    model_runner: Any

    def take_weights(self, weights: bytes) -> None:
        """The tensors of a safetensors file, under transformers' names."""
        self.model_runner.model.load_weights(weights=list(load(weights).items()))


class VllmWriter:
    """One `vllm.LLM`. Raises `EnvironmentFault` without vLLM or without CUDA."""

    def __init__(self, recipe: WorkerRecipe) -> None:
        if not torch.cuda.is_available():
            raise EnvironmentFault('rollout.engine: given "vllm" on a worker without CUDA; wanted a GPU, or "ray"')
        try:
            from vllm import LLM
        except ImportError as problem:
            raise EnvironmentFault(f"rollout.engine: vLLM cannot be imported on a worker: {problem}") from problem
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
