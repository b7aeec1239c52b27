"""`loopos winrate`: how often one language model's answers are preferred to another's.

Enters: two models, prompts, and a judge. Leaves: the rate with its interval as a table or one JSON object on standard
output, and with -o a record a pair. The models are open one after the other. Left out: the rulings
(`evaluation.pair_judges`), the sums (`evaluation.winrate`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli.answers import json_lines, say, say_json, table
from loopos.cli.columns import parse_columns, text_rules
from loopos.cli.opened_models import open_reasoner, require_language_model, require_reward_model
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.row_files import refuse_unwritable, write_whole
from loopos.cli.sampling_options import SamplingOptions, place_diagnostics, refuse
from loopos.config.diagnostics import UserError

if TYPE_CHECKING:
    from loopos.cli.prompts import Asked
    from loopos.data.prompts import PromptContent
    from loopos.evaluation.winrate import Pair, PairJudge, Reply

NO_ROOM = "the prompt leaves a model no position for an answer"
TOO_LONG_TO_JUDGE = "an answer is longer than what the reward model was trained on"


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRateOptions:
    """The options of `loopos winrate`."""

    judge: str
    samples: int = 1
    limit: int | None = None
    output: Path | None = None
    raw: bool = False
    system: str | None = None
    columns: tuple[str, ...] = ()
    encoding: str | None = None
    device: str = "auto"
    precision: str = "auto"
    trust_remote_code: bool = False
    json: bool = False
    verbose: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


def run(first: str, second: str, source: str, options: WinRateOptions) -> int:
    """Answers, judges and prints. Raises `UserError`."""
    refuse(_diagnostics(options))
    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    if options.output is not None:
        refuse_unwritable(options.output, source=source)
    for place in (first, second):
        require_language_model(place)
    if not _is_function(options.judge):
        require_reward_model(options.judge)
    restart_with_settings()
    for sentence in options.sampling.notes():
        note(sentence)
    from loopos.cli.prompts import read_prompts

    asked, dropped = _distinct(read_prompts(source, columns, raw=options.raw, rules=rules), options)
    hush_libraries(verbose=options.verbose)
    # Before anything is generated: a judge that cannot be opened shows at once.
    judge = _opened_judge(options)
    answers = [_replies(place, asked, options) for place in (first, second)]
    pairs = _judged(asked, answers[0], answers[1], judge, dropped)
    if options.output is not None:
        _write(options.output, pairs)
    _tell(first, second, source, options, pairs, dropped)
    return 0


def _diagnostics(options: WinRateOptions) -> list[str]:
    """What is wrong with the options, told without torch."""
    diagnostics = [*options.sampling.diagnostics(), *place_diagnostics(options.device, options.precision)]
    if options.samples < 1:
        diagnostics.append(f"--samples: got {options.samples}; expected 1 or more")
    if options.samples > 1 and options.sampling.temperature == 0:
        diagnostics.append(
            f"--samples {options.samples} at --temperature 0: all answers of a model would be the same; give a "
            "temperature above 0, such as 0.7"
        )
    if options.limit is not None and options.limit < 1:
        diagnostics.append(f"--limit: got {options.limit}; expected 1 or more")
    if options.raw and options.system is not None:
        diagnostics.append("--system with --raw: a raw prompt has no messages; write the words into the prompt")
    return diagnostics


def _is_function(judge: str) -> bool:
    return ":" in judge and not os.path.exists(judge)


def _opened_judge(options: WinRateOptions) -> Callable[[], PairJudge]:
    """What opens the judge. A function is looked up at once; a reward model is opened when the models are gone."""
    from loopos.evaluation import winrate as pair_judges

    if _is_function(options.judge):
        judge = pair_judges.by_function(options.judge)
        return lambda: judge
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.training.precision import pick_device

    device = pick_device(options.device).type
    return lambda: pair_judges.by_reward(RewardPredictor.open(options.judge, device=device))


def _distinct(asked: Sequence[Asked], options: WinRateOptions) -> tuple[list[Asked], Counter[str]]:
    """The prompts, each once: a second answer to the same one would tell nothing new. What was left out is counted."""
    from loopos.data.prompts import REPEATED, prompt_key

    seen: dict[str, Asked] = {}
    for each in (one.with_system(options.system) for one in asked):
        seen.setdefault(prompt_key(_words(each)), each)
    repeated = len(asked) - len(seen)
    return list(seen.values())[: options.limit], Counter({REPEATED: repeated} if repeated else {})


def _words(asked: Asked) -> PromptContent:
    """Messages, or the text that is continued as it is."""
    return asked.messages if asked.messages is not None else asked.text


def _replies(source: str, asked: Sequence[Asked], options: WinRateOptions) -> list[list[Reply] | None]:
    """The answers of one model to every prompt; None for a prompt that leaves it no room."""
    from loopos.evaluation.winrate import Reply

    reasoner = open_reasoner(
        source, device=options.device, precision=options.precision, trust_remote_code=options.trust_remote_code
    )
    prompts = [reasoner.prompt(each.problem) for each in asked]
    most = reasoner.engine.max_positions
    fits = [number for number, prompt in enumerate(prompts) if most is None or len(prompt) < most]
    if not fits:
        raise UserError(f"{source}: every prompt is longer than the model's {most} positions")
    note(f"{source}: answers {len(fits):,} prompts, {options.samples} each")
    settings, number = reasoner.sampling(options.sampling.settings()), options.samples
    found: list[list[Reply] | None] = [None] * len(asked)
    for completion in reasoner.engine.generate([prompts[each] for each in fits], settings, n=number, logprobs=False):
        ended = completion.finish_reason in ("stop token", "stop string")
        prompt = fits[completion.prompt_index]
        replies = found[prompt] = found[prompt] or []
        replies.append(Reply(completion.text, len(completion.token_ids), ended))
    return found


def _judged(
    asked: Sequence[Asked],
    first: Sequence[list[Reply] | None],
    second: Sequence[list[Reply] | None],
    judge: Callable[[], PairJudge],
    dropped: Counter[str],
) -> list[Pair]:
    """Every pair with a ruling. What has none is counted in `dropped`. Raises `UserError` where none is left."""
    from loopos.evaluation.winrate import Contest, Pair

    begun: list[tuple[int, int, Contest, Reply, Reply]] = []
    for index, (each, ours, theirs) in enumerate(zip(asked, first, second, strict=True)):
        if ours is None or theirs is None:
            dropped[NO_ROOM] += 1
            continue
        for sample, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            begun.append((index, sample, Contest(_words(each), a.text, b.text), a, b))
    if not begun:
        raise UserError("no prompt that both models have room for; expected shorter ones")
    note(f"{len(begun):,} pairs are judged")
    rulings = judge()([contest for _, _, contest, _, _ in begun])
    pairs = [Pair(*each, ruling) for each, ruling in zip(begun, rulings, strict=True) if ruling is not None]
    if len(pairs) < len(begun):
        dropped[TOO_LONG_TO_JUDGE] += len(begun) - len(pairs)
    if not pairs:
        raise UserError(f"no pair could be judged: {TOO_LONG_TO_JUDGE}; expected a smaller --max-new-tokens")
    return pairs


def _write(file: Path, pairs: Sequence[Pair]) -> None:
    from loopos.data.prompts import prompt_text
    from loopos.evaluation.winrate import record

    write_whole(file, json_lines(record(pair, prompt_text(pair.contest.prompt)) for pair in pairs))
    note(f"{file}: {len(pairs)} pairs")


def _tell(
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
        told = found["both_orders"]
        say(
            f"  asked in both orders: {told['contradictions']} of {told['asked']} rulings contradict themselves and "
            f"count as ties; {told['first_favoured']} for whatever stood first, {told['second_favoured']} for "
            "whatever stood second"
        )
