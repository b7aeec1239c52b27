"""A rollout worker's vLLM: on a GPU, or on processors with its CPU build.

vLLM reads config and tokenizer and starts with random weights: the first order brings those of the policy. It has its
own random numbers: its texts differ from those of LoopOS's engine with the same seeds. Its tokens become text by
LoopOS's rules, because vLLM leaves out all special tokens or none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loopos.config.diagnostics import MissingRequirement
from loopos.generation.completions import Completion, FinishReason, GrowingText, decoded
from loopos.generation.settings import SamplingParams
from loopos.rl.workers.protocol import Request
from loopos.rl.workers.recipes import VllmRecipe

_NUMBER_FORMATS = {"bf16": "bfloat16", "fp32": "float32"}
# Of the memory of a GPU that is the worker's alone; vLLM's own default.
_GPU_MEMORY = 0.9
_SETTINGS = {
    # Nothing is reported or downloaded.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # In the worker's own process: nothing outlives a worker that is killed, and weights are not copied once more.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_CPU_SETTINGS = {
    # Workers of one host would all bind to the same cores: Ray sets the number of threads by rollout.cpus_per_worker.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # GiB for keys and values; vLLM takes a share of the host's memory otherwise, in every worker.
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # Compiling the few functions of sampling takes half a minute of every worker's start, and a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
}


class TakesWeights:
    """Extension of vLLM's worker class, which has `model_runner`."""

    model_runner: Any

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Loads tensors under the names of the model's files, and packs again what vLLM packs for processors."""
        self.model_runner.reload_weights(weights_iterator=iter(weights.items()))
        # vLLM 0.32 does so only for layers with tensors of their own: an output embedding that is tied to the input's
        # would keep its packed copy of the old weights.
        for layer in self.model_runner.get_model().modules():
            if hasattr(layer, "cpu_linear") and _is_output_embedding(layer):
                layer.quant_method.process_weights_after_loading(layer)


def _is_output_embedding(layer: Any) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, ParallelLMHead)


class VllmWriter:
    """One `vllm.LLM`. Raises `MissingRequirement` without vLLM, or where it does not run this model here."""

    def __init__(self, recipe: VllmRecipe) -> None:
        for name, value in {**_SETTINGS, **({} if recipe.gpus else _CPU_SETTINGS)}.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM
        except ImportError as problem:
            raise MissingRequirement(f"rollout.engine: vLLM cannot be imported on a worker: {problem}") from problem
        self._end_tokens = recipe.end_tokens
        on_cpu = {"enforce_eager": True} if recipe.gpus == 0 else {}
        with _folder_of(recipe.files) as folder, _refusals():
            self._model = LLM(
                model=folder,
                tokenizer=folder,
                load_format="dummy",
                trust_remote_code=recipe.trust_remote_code,
                dtype=_NUMBER_FORMATS[recipe.number_format],
                # -1: the model's own, or what its memory for keys and values allows.
                max_model_len=recipe.max_length or -1,
                gpu_memory_utilization=_GPU_MEMORY * min(1.0, recipe.gpus or 1.0),
                logprobs_mode=recipe.logprobs_mode,
                worker_extension_cls=f"{TakesWeights.__module__}.{TakesWeights.__name__}",
                **on_cpu,
            )
            self._tokenizer: PreTrainedTokenizerBase = self._model.get_tokenizer()
            # Kernels refuse what they do not compute, such as small heads, only when they run.
            self.write(Request([[0]], [SamplingParams(max_new_tokens=1)]))

    def take(self, weights: Mapping[str, Tensor]) -> None:
        self._model.collective_rpc("take_weights", args=(weights,))
        # Cached prefixes belong to the old weights.
        self._model.reset_prefix_cache()

    def write(self, request: Request) -> list[Completion]:
        prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
        sampling = [_sampling(settings, request.n, self._end_tokens) for settings in request.settings]
        answers = self._model.generate(prompts, sampling, use_tqdm=False)
        return [
            # vLLM refuses several greedy samples, which are all the same one.
            _completion((index, sample), answer.outputs[sample % len(answer.outputs)], settings, self._tokenizer)
            for index, (answer, settings) in enumerate(zip(answers, request.settings, strict=True))
            for sample in range(request.n)
        ]


@contextmanager
def _folder_of(files: Mapping[str, bytes]) -> Iterator[str]:
    """The files in a folder for as long as the context lasts."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield folder


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what vLLM raises for a model or a machine that it does not take into `MissingRequirement`."""
    try:
        yield
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        raise MissingRequirement(
            f"rollout.engine: vLLM does not open this model on a worker: {' '.join(lines[:4])}\n"
            'expected a model and a machine that vLLM supports, or rollout.engine "ray"'
        ) from problem


def _sampling(settings: SamplingParams, n: int, end_tokens: tuple[int, ...]) -> Any:
    from vllm import SamplingParams

    ends = {*settings.stop_token_ids, *(end_tokens if settings.stop_at_end else ())}
    return SamplingParams(
        n=1 if settings.greedy else n,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_tokens=settings.max_new_tokens,
        stop=list(settings.stop) or None,
        # The text is decoded here; vLLM only looks for stop strings in it.
        detokenize=bool(settings.stop),
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        # Else it would look in the text of stop tokens too.
        include_stop_str_in_output=False,
        stop_token_ids=sorted(ends) or None,
        ignore_eos=True,
        seed=settings.seed,
        logprobs=0,
    )


def _completion(
    indices: tuple[int, int], output: Any, settings: SamplingParams, tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """One `CompletionOutput`. indices: of prompt and sample. `stop_reason` is the stop string or token."""
    tokens = list(output.token_ids)
    logprobs = [candidates[token].logprob for candidates, token in zip(output.logprobs, tokens, strict=True)]
    reason: FinishReason = "length"
    if output.finish_reason == "stop":
        reason = "stop string" if isinstance(output.stop_reason, str) else "stop"
    text = _text(tokens[: -1 if reason == "stop" else None], settings, tokenizer)
    return Completion(*indices, tokens, text, logprobs, None, (), reason)


def _text(tokens: list[int], settings: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text as LoopOS's engine gives it, cut at the first stop string."""
    if not settings.stop:
        return decoded(tokenizer, tokens)
    text = GrowingText(tokenizer, settings.stop)
    for token in tokens:
        text.add(token)
    return text.whole(keep_stop=settings.keep_stop)
