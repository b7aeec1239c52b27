"""Runs lm-eval tasks (extra `eval`) on LoopOS's engine.

Log-likelihoods come from packed rows without pads, completions from the engine. Tasks and metrics are lm-eval's.
Letters: T tokens of a packed row, M tokens of continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from loopos.config.diagnostics import UserError
from loopos.data.batches import in_packs
from loopos.evaluation.reasoning import Reasoner
from loopos.functional.packing import PackedLayout
from loopos.generation.settings import SamplingParams
from loopos.models.language_ensemble import TokenScores

# Tokens of one forward pass.
_TOKENS = 2048
# lm-eval's context length of a model without a limit of positions, and longest answer of a task without one.
_POSITIONS, _NEW_TOKENS = 2048, 256
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


class EngineModel(TemplateLM):  # type: ignore[misc]
    """A language model, or an ensemble, behind lm-eval's model interface."""

    def __init__(
        self, reasoner: Reasoner, *, seed: int = 0, note: Callable[[str], None] = lambda summary: None
    ) -> None:
        """seed: of tasks that sample. note: takes a line of progress. Raises `UserError` for a model whose tokens
        cannot be scored, or an ensemble that votes.
        """
        super().__init__()
        if reasoner.voters:
            raise UserError(
                "--tasks: an ensemble that votes has no distribution over tokens; use one with method mean or logits"
            )
        self.reasoner, self.tokenizer, self.seed, self.note = reasoner, reasoner.tokenizer, seed, note
        self.scores = TokenScores(reasoner.model)
        self.max_length = reasoner.engine.max_positions or _POSITIONS

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Name for lm-eval's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that the model was trained with, or the plain one."""
        return self.reasoner.template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders messages as one text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=self.reasoner.template.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes like the tokenizer; does not double a begin token that the text already contains."""
        actual = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(str(self.tokenizer.decode([self.prefix_token_id]))):
            actual = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **actual))

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Σ log p of each continuation after its context, and whether greedy decoding gives it. Inputs longer than the
        model's positions lose their beginning, as in lm-eval's own models.
        """
        rows = [[*context, *expected][-(self.max_length + 1) :] for _, context, expected in requests]
        counts = [len(expected) for _, _, expected in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        device, num_done = self.reasoner.model.device, 0
        for pack in in_packs([len(row) - 1 for row in rows], tokens=_TOKENS):
            # The last token is never an input: nothing comes after it.
            layout = PackedLayout(tuple(len(rows[index]) - 1 for index in pack), device)
            ids = torch.tensor([token for index in pack for token in rows[index][:-1]], device=device)
            chosen = torch.tensor([token for index in pack for token in rows[index][-counts[index] :]], device=device)
            ends = [int(end) + 1 for end in layout.ends()]
            positions = [at for index, end in zip(pack, ends, strict=True) for at in range(end - counts[index], end)]
            logprobs, likeliest = self.scores.of(ids, layout, torch.tensor(positions, device=device), chosen)
            split = [counts[index] for index in pack]
            for index, each, greedy in zip(
                pack, torch.split(logprobs, split), torch.split(likeliest, split), strict=True
            ):
                found[index] = (float(each.sum()), bool(greedy.all()))
            num_done += len(pack)
            self.note(f"log-likelihoods {num_done:,}/{len(rows):,}")
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the model's positions, with every token counted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, (text,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, expected in map(make_disjoint_window, cut):
                windows.append((None, context, expected))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions, each up to its first stop string; contexts that leave no room lose their beginning."""
        prompts: list[list[int]] = []
        settings: list[SamplingParams] = []
        for context, request_settings in (request.args for request in requests):
            chosen = self._settings(request_settings)
            room = self.max_length - chosen.max_new_tokens
            if room < 1:
                raise UserError(
                    f"a task requests {chosen.max_new_tokens} new tokens, but the model has {self.max_length} positions"
                )
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            settings.append(chosen)
        self.note(f"completions of {len(prompts):,} prompts")
        return [each.text for each in self.reasoner.engine.generate(prompts, settings, logprobs=False)]

    def _settings(self, request_settings: Mapping[str, Any]) -> SamplingParams:
        """A task's sampling settings. Raises `UserError` for an unknown setting."""
        actual = normalize_gen_kwargs(dict(request_settings), _NEW_TOKENS)
        until, most = actual.pop("until", None) or [], actual.pop("max_gen_toks")
        stops = [until] if isinstance(until, str) else until
        does_sample, temperature = actual.pop("do_sample", False), actual.pop("temperature", 0.0)
        unknown = sorted(set(actual) - set(_SAMPLING))
        if unknown:
            raise UserError(
                f"a task generates with {', '.join(unknown)}; supported are temperature, {', '.join(_SAMPLING)}"
            )
        return SamplingParams(
            temperature=float(temperature) if does_sample else 0.0,
            max_new_tokens=int(most),
            stop=tuple(dict.fromkeys(stop for stop in stops if stop)),
            seed=self.seed,
            **actual,
        )


def run_tasks(
    model: EngineModel,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """lm-eval's results: `results` has the metrics of each task, `samples` the answers to each document.

    num_fewshot: worked examples before each question; None: the task's own number. limit: maximum documents per task.
    folder: additional tasks. chat: apply the chat template. Raises `UserError` for unknown task names.
    """
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder is not None else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        # lm-eval's own tasks are thousands of files: they are read only when needed.
        manager = TaskManager(include_path=str(folder) if folder is not None else None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks: lm-eval has no task {', '.join(unknown)}; list them with: lm-eval ls tasks")
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(names),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
        random_seed=model.seed,
        numpy_random_seed=model.seed,
        torch_random_seed=model.seed,
    )
    return found
