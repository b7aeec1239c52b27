"""`loopos winrate`: how often one language model's answers are preferred to another's.

Prints the rate with its interval as a table or JSON; with -o writes one record per pair. The models are open one after
the other. Rulings are in `evaluation.pair_judges`, sums in `evaluation.winrate`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import json_lines, refuse_unwritable, say, say_json, table, write_whole
from loopos.cli.options import (
    Columns,
    Device,
    Encoding,
    Json,
    Limit,
    Precision,
    Raw,
    Subset,
    System,
    TrustRemoteCode,
    Verbose,
    argument,
    device_diagnostics,
    parse_columns,
    path,
    refuse,
    text_rules,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.cli.sampling_options import SamplingOptions
from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded

if TYPE_CHECKING:
    from loopos.cli.prompts import PromptInput
    from loopos.evaluation.winrate import Pair, PairJudge, Reply
    from loopos.models.resolve import ModelRef

NO_ROOM = "the prompt leaves a model no position for an answer"
TOO_LONG_TO_JUDGE = "an answer is longer than what the reward model was trained on"

ModelA = Annotated[str, argument("A", "Language model, as for generate.")]
ModelB = Annotated[str, argument("B", "Language model to compare A with.")]
PromptsFile = Annotated[
    str,
    argument("PROMPTS", "One prompt per line, a data file, or - for stdin."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRateOptions:
    """The options of `loopos winrate`."""

    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help="Reward-model run, or module:function.",
            show_default=False,
            parser=expanded,
        ),
    ]
    samples: Annotated[
        int, typer.Option("--samples", "-n", help="Answers of each model per prompt, compared in pairs.")
    ] = 1
    sampling: Annotated[SamplingOptions, Subset(("temperature", "top_k", "top_p", "max_new_tokens", "stop", "seed"))]
    limit: Limit = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write one JSON line per pair.", parser=path)
    ] = None
    raw: Raw = False
    system: System = None
    columns: Columns = ()
    encoding: Encoding = None
    device: Device = "auto"
    precision: Precision = "auto"
    trust_remote_code: TrustRemoteCode = False
    json: Json = False
    verbose: Verbose = False


def run(first: ModelA, second: ModelB, source: PromptsFile, options: WinRateOptions) -> int:
    """Answers, judges and prints. Raises `UserError`."""
    from loopos.cli.opened_models import require_language_model, require_reward_model

    refuse(_diagnostics(options))
    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    if options.output is not None:
        refuse_unwritable(options.output, source=source)
    models = [require_language_model(each) for each in (first, second)]
    reward_model = None if _is_function(options.judge) else require_reward_model(options.judge)
    prepare_to_compute(verbose=options.verbose)
    for sentence in options.sampling.notes():
        note(sentence)
    from loopos.cli.prompts import read_prompts

    prompts, dropped = _distinct(read_prompts(source, columns, raw=options.raw, rules=rules), options)
    # Before anything is generated, so that a judge that cannot be opened fails at once.
    judge = _opened_judge(options, reward_model)
    answers = [_replies(model, prompts, options) for model in models]
    pairs = _judged(prompts, answers[0], answers[1], judge, dropped)
    if options.output is not None:
        _write(options.output, pairs)
    _print_summary(first, second, source, options, pairs, dropped)
    return 0


def _diagnostics(options: WinRateOptions) -> list[str]:
    """Messages for invalid options; without torch."""
    diagnostics = [*options.sampling.diagnostics(), *device_diagnostics(options.device, options.precision)]
    if options.samples < 1:
        diagnostics.append(f"--samples: got {options.samples}; expected 1 or more")
    if options.samples > 1 and options.sampling.temperature == 0:
        diagnostics.append(
            f"--samples {options.samples} at --temperature 0: all answers of a model would be equal; use a "
            "temperature above 0, for example 0.7"
        )
    if options.limit is not None and options.limit < 1:
        diagnostics.append(f"--limit: got {options.limit}; expected 1 or more")
    if options.raw and options.system is not None:
        diagnostics.append("--system with --raw: a raw prompt has no messages; put the text into the prompt")
    return diagnostics


def _is_function(judge: str) -> bool:
    return ":" in judge and not os.path.exists(judge)


def _opened_judge(options: WinRateOptions, reward_model: ModelRef | None) -> Callable[[], PairJudge]:
    """Opens the judge when called: a function is resolved at once, a reward model only after the models are closed."""
    from loopos.evaluation import winrate as pair_judges

    if reward_model is None:
        judge = pair_judges.by_function(options.judge)
        return lambda: judge
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.training.precision import pick_device

    device = pick_device(options.device).type
    return lambda: pair_judges.by_reward(RewardPredictor.open(reward_model, device=device))


def _distinct(prompts: Sequence[PromptInput], options: WinRateOptions) -> tuple[list[PromptInput], Counter[str]]:
    """The distinct prompts, and counts of what was left out: a second answer to the same prompt adds no information."""
    from loopos.data.prompts import REPEATED, prompt_key

    seen: dict[str, PromptInput] = {}
    for each in (one.with_system(options.system) for one in prompts):
        seen.setdefault(prompt_key(each.content), each)
    repeated = len(prompts) - len(seen)
    return list(seen.values())[: options.limit], Counter({REPEATED: repeated} if repeated else {})


def _replies(model: ModelRef, requests: Sequence[PromptInput], options: WinRateOptions) -> list[list[Reply] | None]:
    """The answers of one model to every prompt; None for a prompt that leaves no room for an answer."""
    from loopos.cli.opened_models import open_reasoner
    from loopos.evaluation.winrate import Reply

    reasoner = open_reasoner(
        model, device=options.device, precision=options.precision, trust_remote_code=options.trust_remote_code
    )
    prompts = [reasoner.prompt(each.problem) for each in requests]
    most = reasoner.engine.max_positions
    fits = [number for number, prompt in enumerate(prompts) if most is None or len(prompt) < most]
    if not fits:
        raise UserError(f"{model.name}: every prompt is longer than the model's {most} positions")
    note(f"{model.name}: answers {len(fits):,} prompts, {options.samples} each")
    settings, number = reasoner.sampling(options.sampling.settings()), options.samples
    found: list[list[Reply] | None] = [None] * len(requests)
    for completion in reasoner.engine.generate([prompts[each] for each in fits], settings, n=number, logprobs=False):
        ended = completion.finish_reason in ("stop", "stop string")
        prompt = fits[completion.prompt_index]
        replies = found[prompt] = found[prompt] or []
        replies.append(Reply(completion.text, len(completion.token_ids), ended))
    return found


def _judged(
    prompts: Sequence[PromptInput],
    first: Sequence[list[Reply] | None],
    second: Sequence[list[Reply] | None],
    judge: Callable[[], PairJudge],
    dropped: Counter[str],
) -> list[Pair]:
    """All pairs with a ruling; those without are counted in `dropped`. Raises `UserError` if none is left."""
    from loopos.evaluation.winrate import Contest, Pair

    begun: list[tuple[int, int, Contest, Reply, Reply]] = []
    for index, (each, ours, others) in enumerate(zip(prompts, first, second, strict=True)):
        if ours is None or others is None:
            dropped[NO_ROOM] += 1
            continue
        for sample, (a, b) in enumerate(zip(ours, others, strict=True)):
            begun.append((index, sample, Contest(each.content, a.text, b.text), a, b))
    if not begun:
        raise UserError("no prompt leaves both models room for an answer; use shorter prompts")
    note(f"judging {len(begun):,} pairs")
    rulings = judge()([contest for _, _, contest, _, _ in begun])
    pairs = [Pair(*each, ruling) for each, ruling in zip(begun, rulings, strict=True) if ruling is not None]
    if len(pairs) < len(begun):
        dropped[TOO_LONG_TO_JUDGE] += len(begun) - len(pairs)
    if not pairs:
        raise UserError(f"no pair could be judged: {TOO_LONG_TO_JUDGE}; use a smaller --max-new-tokens")
    return pairs


def _write(file: Path, pairs: Sequence[Pair]) -> None:
    from loopos.data.prompts import prompt_text
    from loopos.evaluation.winrate import record

    write_whole(file, json_lines(record(pair, prompt_text(pair.contest.prompt)) for pair in pairs))
    note(f"{file}: {len(pairs)} pairs")


def _print_summary(
    first: str, second: str, source: str, options: WinRateOptions, pairs: Sequence[Pair], dropped: Counter[str]
) -> None:
    from loopos.evaluation.winrate import LIKE_LENGTH, summary

    found = summary(pairs)
    if options.json:
        names = {"a": first, "b": second, "prompts": source, "judge": options.judge}
        say_json({**names, "pairs": len(pairs), "dropped": dict(dropped), **found})
        return
    left_out = "".join(f", {count} dropped ({reason})" for reason, count in dropped.items())
    say(f"A {first} against B {second}, judged by {options.judge}")
    say(f"{source}: {found['win_rate']['prompts']:,} prompts, {len(pairs):,} pairs{left_out}")
    figures = ("rate", "low", "high", "wins", "losses", "ties")
    rows: list[list[Any]] = [["A wins", *(found["win_rate"][name] for name in figures)]]
    if found["like_length"] is not None:
        like = found["like_length"]
        rows.append([f"lengths within {1 - LIKE_LENGTH:.0%}", *(like[name] for name in figures)])
    say(table(rows, head=("", "rate", "95% from", "to", "wins", "losses", "ties")))
    say(table([(name.upper(), *length.values()) for name, length in found["length"].items()],
              head=("", "characters", "tokens", "ended")))  # fmt: skip
    if "both_orders" in found:
        orders = found["both_orders"]
        say(
            f"  judged in both orders: {orders['contradictions']} of {orders['asked']} rulings contradict themselves "
            f"and count as ties; {orders['first_favoured']} prefer whichever came first, {orders['second_favoured']} "
            "whichever came second"
        )
