"""A GGUF file as llama.cpp itself reads it, where the package xllamacpp is installed.

Enters: a GGUF file and a conversation, or a text. Leaves: the greedy answer, token by token. Left out: what is made of
it (`language_check.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class LlamaAnswer:
    """num_prompt: tokens that the prompt became. text: the answer, as a user reads it."""

    num_prompt: int
    text: str


@dataclass(frozen=True)
class LlamaStep:
    """The likeliest next token and its log-probability."""

    token: int
    logprob: float


def has_llama_cpp() -> bool:
    """Whether llama.cpp is here."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file opened by llama.cpp, on CPU, with keys and values in fp32. Raises `RuntimeError` where it cannot."""

    def __init__(self, file: Path, *, context: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.n_gpu_layers = 0
        settings.warmup = False
        settings.use_jinja = True
        settings.verbosity = -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(settings)

    def chat(self, messages: Sequence[Mapping[str, str]], num_tokens: int) -> LlamaAnswer:
        """The greedy answer to a conversation, written by the chat template in the file."""
        given = {"messages": [dict(each) for each in messages], "max_tokens": num_tokens}
        found = self._server.handle_chat_completions({**given, **_GREEDY, "reasoning_format": "none"})
        return LlamaAnswer(int(found["usage"]["prompt_tokens"]), found["choices"][0]["message"]["content"] or "")

    def complete(self, prompt: str, num_tokens: int) -> LlamaAnswer:
        """The greedy continuation of a text."""
        found = self._server.handle_completions({"prompt": prompt, "max_tokens": num_tokens, **_GREEDY})
        return LlamaAnswer(int(found["usage"]["prompt_tokens"]), found["choices"][0]["text"])

    def next_token(self, ids: Sequence[int]) -> LlamaStep | None:
        """What comes behind these tokens; None where llama.cpp does not tell it, as of a token that ends within a
        character.
        """
        found = self._server.handle_completions({"prompt": list(ids), "max_tokens": 1, "logprobs": 1, **_GREEDY})
        steps = (found["choices"][0]["logprobs"] or {}).get("content")
        return LlamaStep(int(steps[0]["id"]), float(steps[0]["logprob"])) if steps else None


_GREEDY: Mapping[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
