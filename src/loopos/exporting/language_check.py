"""Checks of an exported language model: logits on a probe text, prompt tokens, and a greedy answer.

LoopOS (by transformers) opens the export, and llama.cpp a GGUF file too if the package xllamacpp is installed.
Everything runs in fp32 on CPU, one model after the other. Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.exporting.checks import PROBE, Check, compared, probe_ids, round_weights
from loopos.models.gguf import convert
from loopos.models.load import Pretrained, load_pretrained


@dataclass(frozen=True)
class LlamaAnswer:
    """num_prompt: number of prompt tokens. text: the answer, as a user reads it."""

    num_prompt: int
    text: str


@dataclass(frozen=True)
class LlamaStep:
    """The most likely next token and its log-probability."""

    token: int
    logprob: float


def has_llama_cpp() -> bool:
    """Whether llama.cpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file opened by llama.cpp, on CPU, with an fp32 KV cache. Raises `RuntimeError` if it cannot be opened."""

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
        """The greedy answer to a conversation, by the chat template in the file."""
        actual = {"messages": [dict(each) for each in messages], "max_tokens": num_tokens}
        found = self._server.handle_chat_completions({**actual, **_GREEDY, "reasoning_format": "none"})
        return LlamaAnswer(int(found["usage"]["prompt_tokens"]), found["choices"][0]["message"]["content"] or "")

    def complete(self, prompt: str, num_tokens: int) -> LlamaAnswer:
        """The greedy continuation of a text."""
        found = self._server.handle_completions({"prompt": prompt, "max_tokens": num_tokens, **_GREEDY})
        return LlamaAnswer(int(found["usage"]["prompt_tokens"]), found["choices"][0]["text"])

    def next_token(self, ids: Sequence[int]) -> LlamaStep | None:
        """The token after these tokens; None if llama.cpp does not report it, as for a token that ends inside a
        character.
        """
        found = self._server.handle_completions({"prompt": list(ids), "max_tokens": 1, "logprobs": 1, **_GREEDY})
        steps = (found["choices"][0]["logprobs"] or {}).get("content")
        return LlamaStep(int(steps[0]["id"]), float(steps[0]["logprob"])) if steps else None


_GREEDY: Mapping[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}


ANSWER_TOKENS = 16
_MESSAGES = ({"role": "user", "content": PROBE},)
# Nats by which llama.cpp's log-probabilities may differ: it rounds inputs of products to the weights' format.
_LLAMA_NATS = {"f32": 0.01, "f16": 0.05, "bf16": 0.2}


@dataclass(frozen=True)
class Reference:
    """The model before its export. sequences: the probe's tokens, and the prompt with the greedy answer. original,
    rounded: logits `[T, V]` of each, with the weights unchanged and rounded to the export's number format. answer: the
    greedy answer of the rounded weights; text: that of its first 0, 1, 2 … tokens, without an incomplete character;
    logprobs: `[T, V]` at each of its tokens. chats: whether the chat template made the prompt.
    """

    probe: Sequence[int]
    prompt: Sequence[int]
    chats: bool
    sequences: Sequence[Sequence[int]]
    original: Sequence[Tensor]
    rounded: Sequence[Tensor]
    answer: Sequence[int]
    text: Sequence[str]
    logprobs: Tensor


def reference(folder: Path, dtype: torch.dtype | None, *, matrices_only: bool = False) -> Reference:
    """The model in `folder`. dtype: the format to which the export rounds its weights, for GGUF only the matrices; None
    if the weights stay unchanged. Raises `UserError` for a folder that cannot be opened.
    """
    opened = _opened(folder)
    probe = probe_ids(folder, opened.model.config)[0].tolist()
    prompt, chats = prompt_of(opened.tokenizer, opened.model, probe)
    own = greedy(opened.model, prompt)
    sequences = [probe, [*prompt, *own]]
    original = [_logits(opened.model, ids) for ids in sequences]
    rounded = original
    if dtype is not None and dtype != torch.float32:
        round_weights(opened.model, dtype, matrices_only=matrices_only)
        rounded = [_logits(opened.model, ids) for ids in sequences]
        own = greedy(opened.model, prompt)
    logits = _logits(opened.model, [*prompt, *own])[len(prompt) - 1 : -1]
    text = [
        str(opened.tokenizer.decode(own[:number], skip_special_tokens=True)).rstrip("\ufffd")
        for number in range(len(own) + 1)
    ]
    return Reference(probe, prompt, chats, sequences, original, rounded, own, text, logits.log_softmax(-1))


def check_folder(expected: Reference, out: Path) -> Check:
    """Checks a folder as transformers and LoopOS open it."""
    return _compared_with(expected, _opened(out), "transformers")


def check_gguf(expected: Reference, file: Path, type_name: str, scratch: Path) -> Check:
    """Checks a GGUF file as LoopOS opens it, by transformers' reader, and as llama.cpp does if installed. scratch: an
    empty folder.
    """
    convert(file, scratch)
    check = _compared_with(expected, _opened(scratch), "LoopOS")
    if not has_llama_cpp():
        return check
    try:
        text, diagnostics = _by_llama_cpp(expected, file, _LLAMA_NATS.get(type_name))
    except RuntimeError as problem:
        return replace(check, diagnostics=(*check.diagnostics, f"llama.cpp cannot open it: {problem}"))
    return replace(check, texts=(*check.texts, text), diagnostics=(*check.diagnostics, *diagnostics))


def _opened(folder: Path) -> Pretrained:
    opened = load_pretrained(str(folder), causal=True, quantized=True)
    opened.model.eval()  # type: ignore[no-untyped-call]
    return opened


def _compared_with(expected: Reference, again: Pretrained, program: str) -> Check:
    check = compared(expected.original, [_logits(again.model, ids) for ids in expected.sequences], expected.rounded)
    diagnostics = list(check.diagnostics)
    prompt, _ = prompt_of(again.tokenizer, again.model, expected.probe)
    for name, own, found in (
        ("the probe text", expected.probe, again.tokenizer(PROBE)["input_ids"][: len(expected.probe)]),
        ("the chat template" if expected.chats else "the prompt", expected.prompt, prompt),
    ):
        if list(found) != list(own):
            diagnostics.append(
                f"{program} makes {len(found)} tokens of {name}, expected {len(own)}; the first difference is at token "
                f"{_agreeing(own, found) + 1}"
            )
    answer = greedy(again.model, expected.prompt)
    equal = _agreeing(expected.answer, answer)
    if equal < len(expected.answer):
        diagnostics.append(
            f"{program} writes a different greedy answer from token {equal + 1} of {len(expected.answer)}"
        )
    kind = "chat " if expected.chats else ""
    text = f"greedy {kind}text by {program}: {equal} of {len(expected.answer)} tokens the same"
    return replace(check, texts=(text,), diagnostics=tuple(diagnostics))


def _by_llama_cpp(expected: Reference, file: Path, tolerance: float | None) -> tuple[str, list[str]]:
    """A summary of llama.cpp's answer, and differences that its rounding does not explain."""
    runtime = LlamaCpp(file, context=len(expected.prompt) + 4 * ANSWER_TOKENS)
    steps = [
        runtime.next_token([*expected.prompt, *expected.answer[:number]]) for number in range(len(expected.answer))
    ]
    if expected.chats:
        answer = runtime.chat(_MESSAGES, ANSWER_TOKENS)
    else:
        answer = runtime.complete(PROBE, ANSWER_TOKENS)
    return compared_with_llama_cpp(expected, steps, answer, tolerance)


def compared_with_llama_cpp(
    expected: Reference, steps: Sequence[LlamaStep | None], answer: LlamaAnswer, tolerance: float | None
) -> tuple[str, list[str]]:
    """A summary of llama.cpp's answer, and differences that its rounding does not explain. steps: its next token after
    each prefix of the model's answer. tolerance: nats by which log-probabilities may differ, and by which a token that
    it prefers may be less likely in the model; None for a lossy format.
    """
    diagnostics = []
    if answer.num_prompt != len(expected.prompt):
        diagnostics.append(
            f"llama.cpp makes {answer.num_prompt} tokens of the prompt, expected {len(expected.prompt)}: it renders "
            "the chat template or splits text differently"
        )
    found = list(zip(expected.answer, expected.logprobs, steps, strict=True))
    differs = [step is not None and step.token != token for token, _, step in found]
    equal = differs.index(True) if True in differs else len(differs)
    if tolerance is not None and not diagnostics:
        # A token that one prefers and the other does not: both may be off by the tolerance.
        gaps = [
            max(abs(float(row[step.token]) - step.logprob), float(row[token] - row[step.token]))
            for token, row, step in found
            if step is not None
        ]
        if gaps and not max(gaps) <= tolerance:
            diagnostics.append(
                f"llama.cpp's log-probabilities differ by up to {max(gaps):.2g} nats along the greedy answer; "
                f"expected at most {tolerance}"
            )
        own = expected.text[equal].strip()
        if not answer.text.strip().startswith(own):
            diagnostics.append(f"llama.cpp writes {answer.text.strip()!r}; expected a text that starts with {own!r}")
    kind = "chat " if expected.chats else ""
    return f"greedy {kind}text by llama.cpp: {equal} of {len(differs)} tokens the same", diagnostics


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, probe: Sequence[int]
) -> tuple[Sequence[int], bool]:
    """The prompt tokens, and whether the chat template made them; without a template, the probe."""
    if tokenizer.chat_template is None:
        return probe, False
    try:
        text = tokenizer.apply_chat_template(
            [dict(each) for each in _MESSAGES], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as problem:
        raise UserError(f"its chat template cannot render one user message: {problem}") from problem
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(ids) + ANSWER_TOKENS > positions:
        return probe, False
    return ids, True


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """The most likely tokens after the prompt, one after the other, up to a stop token."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(prompt) + ANSWER_TOKENS
    number = min(ANSWER_TOKENS, positions - len(prompt))
    if number <= 0:
        return []
    ends = getattr(model.generation_config, "eos_token_id", None)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=number, do_sample=False, num_beams=1, repetition_penalty=1.0, eos_token_id=ends, pad_token_id=0
    )
    ids = torch.tensor([list(prompt)])
    runner: Any = model
    written = runner.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [int(token) for token in written[0, len(prompt) :]]


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0].float()
    return found


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
