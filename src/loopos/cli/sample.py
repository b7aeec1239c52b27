"""`loopos sample`: on-policy data. A model answers every prompt several times, a judge scores the answers, and the best
ones, pairs, groups or all become a file that training reads.

The work is in `rl.rejection_sampling`; a killed command continues where it was when it is run again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from loopos.cli.answers import refuse_unwritable, say, say_json, table
from loopos.cli.options import (
    LanguageModel,
    argument,
    parse_columns,
    refuse,
    text_rules,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.cli.sample_options import CHECKERS, SampleOptions, diagnostics, is_function
from loopos.config.diagnostics import UserError
from loopos.storage.folder_lock import only_writer

if TYPE_CHECKING:
    from loopos.cli.prompts import PromptInput
    from loopos.data.step_format import StepFormat
    from loopos.evaluation.reasoning import Reasoner
    from loopos.models.resolve import ModelRef
    from loopos.rl.rejection_sampling import Judge, RejectionSampler, Request, Speed

NO_ROOM = "the prompt leaves the model no position for an answer"
# Below this a judge model does not answer with the grades.
_LEAST_MASS = 0.2

Prompts = Annotated[str, argument("PROMPTS", "One prompt per line, a data file, or - for stdin.")]


def run(location: LanguageModel, source: Prompts, options: SampleOptions) -> int:
    """Samples, judges, selects, writes and prints. Raises `UserError`."""
    from loopos.cli.opened_models import require_language_model

    refuse([*diagnostics(options)])
    columns, rules = parse_columns(options.columns), text_rules(options.encoding)
    refuse_unwritable(options.output, source=source)
    model, judge_of = require_language_model(location), _judge_of(options)
    prepare_to_compute(verbose=options.verbose)
    for sentence in options.sampling.notes():
        note(sentence)
    from loopos.cli.bar import Bar
    from loopos.cli.prompts import read_prompts
    from loopos.rl.rejection_sampling import RejectionSampler

    prompts = read_prompts(source, columns, raw=options.raw, rules=rules)
    folder = options.output.with_name(f"{options.output.name}.progress")
    with only_writer(folder, note=note), Bar("prompts") as bar:
        reasoner = _opened(model, options)
        requests, dropped = _requests(reasoner, prompts, options)
        sampler = RejectionSampler(folder, requests, n=options.samples, chunk=_chunk(options))
        # Before anything is generated, so that a checker or function that cannot be used fails at once.
        open_judge = judge_of(reasoner.step_format, requests)
        speed = _sampled(sampler, reasoner, options, bar.progress)
        # The judge may need the memory.
        del reasoner
        judge = open_judge()
        if judge is not None:
            sampler.judge(judge, note=note, progress=bar.progress)
        found = _written(sampler, judge, options)
    # The lock leaves a folder of an earlier command.
    with suppress(OSError):
        folder.rmdir()
    if speed.tokens:
        found["tokens_per_second"] = speed.tokens / speed.seconds
    _print_summary(location, source, options, found | {"dropped": dict(dropped)})
    return 0


def _opened(model: ModelRef, options: SampleOptions) -> Reasoner:
    """The model that answers, or that prompts are rendered for where an endpoint answers. Raises `UserError`."""
    from loopos.cli.opened_models import open_reasoner, require_language_model

    taught = options.taught
    own = taught.teacher is None or taught.is_endpoint
    reasoner = open_reasoner(
        model if own else require_language_model(str(taught.teacher)),
        device=options.device,
        precision=options.precision,
        trust_remote_code=options.trust_remote_code,
    )
    if not own and taught.logprobs is not None:
        from loopos.data.templates import ChatTemplate
        from loopos.models.folders import check_same_tokens
        from loopos.models.tokenizers import open_tokenizer

        # The tokens are those that MODEL learns: its template renders the prompts and ends the answers.
        student = open_tokenizer(model, trust_remote_code=options.trust_remote_code)
        check_same_tokens(student, reasoner.tokenizer, f"--teacher {taught.teacher}", of="student")
        reasoner.template = ChatTemplate(student)
    return reasoner


def _chunk(options: SampleOptions) -> int | None:
    """Prompts of a chunk; None for the sampler's own number."""
    if options.chunk is not None or not options.taught.is_endpoint:
        return options.chunk
    from loopos.rl.endpoint_answers import ANSWERS_OF_A_CHUNK

    return max(1, ANSWERS_OF_A_CHUNK // options.samples)


def _sampled(
    sampler: RejectionSampler, reasoner: Reasoner, options: SampleOptions, progress: Callable[[int, int], None]
) -> Speed:
    """Makes the answers, with the model or by the endpoint. Raises `UserError`."""
    taught = options.taught
    if not taught.is_endpoint:
        logprobs = None
        if taught.logprobs is not None:
            from loopos.evaluation.teacher_logprobs import TeacherLogprobs

            logprobs = TeacherLogprobs(reasoner.model, reasoner.tokenizer, taught.logprobs)
        return sampler.sample(reasoner, options.sampling.settings(), logprobs=logprobs, progress=progress)
    from loopos.evaluation.chat_endpoint import ChatEndpoint
    from loopos.rl.endpoint_answers import EndpointAnswers

    assert taught.teacher is not None, "checked with the options"
    assert taught.teacher_model is not None, "checked with the options"
    endpoint = ChatEndpoint(base_url=taught.teacher, model=taught.teacher_model, api_key_env=taught.api_key_env)

    def count(text: str) -> int:
        return len(reasoner.tokenizer(text, add_special_tokens=False)["input_ids"])

    answers = EndpointAnswers(endpoint, options.sampling.settings(), options.samples, count)
    return sampler.write_with(answers, answers.identity(sampler.requests, sampler.chunk), progress=progress)


def _judge_of(options: SampleOptions) -> Callable[[StepFormat, Sequence[Request]], Callable[[], Judge | None]]:
    """Resolves the judge without torch. The result checks it for the requests; its result opens it. Raises
    `UserError`.
    """
    from loopos.cli.opened_models import require_language_model, require_reward_model

    name, judged = options.judged.judge, options.judged
    if judged.judge_model is not None:
        return _grader_of(require_language_model(judged.judge_model), options)
    if name is None:
        return lambda step_format, requests: lambda: None
    if not is_function(name):
        return _reward_model_of(require_reward_model(name), options)

    def check(step_format: StepFormat, requests: Sequence[Request]) -> Callable[[], Judge]:
        from loopos.rl.rejection_sampling import by_checker, by_function

        if name in CHECKERS:
            judge = by_checker(name, step_format, requests)
        else:
            judge = by_function(name, requests, json.loads(judged.judge_options or "{}"))
        return lambda: judge

    return check


def _reward_model_of(
    ref: ModelRef, options: SampleOptions
) -> Callable[[StepFormat, Sequence[Request]], Callable[[], Judge]]:
    def opened() -> Judge:
        from loopos.evaluation.reward_predictor import RewardPredictor
        from loopos.rl.rejection_sampling import by_reward
        from loopos.training.precision import pick_device

        return by_reward(RewardPredictor.open(ref, device=pick_device(options.device).type))

    return lambda step_format, requests: opened


def _grader_of(ref: ModelRef, options: SampleOptions) -> Callable[[StepFormat, Sequence[Request]], Callable[[], Judge]]:
    def check(step_format: StepFormat, requests: Sequence[Request]) -> Callable[[], Judge]:
        from loopos.data.rows import read_plain_text
        from loopos.evaluation.grading_prompt import GRADING_PROMPT, GradingPrompt

        file = options.judged.grading_prompt
        text = GRADING_PROMPT if file is None else read_plain_text(str(file))
        prompt = GradingPrompt.of(text, options.judged.grades.split(","))
        for each in requests:
            prompt.filled({**each.row.values, "prompt": "", "response": ""})

        def opened() -> Judge:
            from loopos.cli.opened_models import open_reasoner
            from loopos.evaluation.grading import Grader
            from loopos.rl.rejection_sampling import by_grader

            reasoner = open_reasoner(
                ref, device=options.device, precision="auto", trust_remote_code=options.trust_remote_code
            )
            return by_grader(Grader(reasoner, prompt), requests)

        return opened

    return check


def _requests(
    reasoner: Reasoner, prompts: Sequence[PromptInput], options: SampleOptions
) -> tuple[list[Request], Counter[str]]:
    """The distinct prompts that leave room for an answer, and counts of what was left out.

    Distinct by their tokens: two equal prompts would draw the same numbers in two chunks, and others in one. Raises
    `UserError` if no prompt is left.
    """
    from loopos.data.prompts import REPEATED
    from loopos.data.rows import Row
    from loopos.rl.rejection_sampling import Request

    most, dropped = reasoner.engine.max_positions, Counter[str]()
    found: dict[tuple[int, ...], Request] = {}
    for number, each in enumerate(prompts):
        prompt = each.with_system(options.system)
        ids = tuple(reasoner.prompt(prompt.problem))
        if most is not None and len(ids) >= most:
            dropped[NO_ROOM] += 1
        elif ids in found:
            dropped[REPEATED] += 1
        elif options.limit is None or len(found) < options.limit:
            row = prompt.row or Row({}, "prompt", None, number)
            beside = tuple(name for name in row.values if name not in prompt.columns)
            found[ids] = Request(prompt.content, ids, row, prompt.expected, prompt.tools, beside)
    if not found:
        raise UserError(f"every prompt is longer than the model's {most} positions; use shorter prompts")
    return list(found.values()), dropped


def _written(sampler: RejectionSampler, judge: Judge | None, options: SampleOptions) -> dict[str, Any]:
    """Writes the rows; all figures by name, as docs/metrics.md defines them."""
    from loopos.evaluation.policy_metrics import best_of_n_kl
    from loopos.evaluation.sample_metrics import PromptFigures, sample_metrics
    from loopos.rl.selection import SELECTIONS, length_metrics

    rule = options.selected.rule(None if judge is None else judge.threshold, options.sampling.seed)
    figures: list[PromptFigures] = []
    sides: tuple[list[int], list[int]] = ([], [])
    counts = Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for prompt in sampler.prompts(judged=judge is not None):
            figures.append(PromptFigures.of(prompt.samples, prompt.scores))
            selection = SELECTIONS[options.selected.keep](prompt, rule)
            for side, indices in zip(sides, (selection.chosen, selection.rejected), strict=True):
                side.extend(prompt.samples[index].num_tokens for index in indices)
            counts["rows"] += len(selection.rows)
            counts["prompts"] += bool(selection.rows)
            yield from selection.rows

    sampler.write(options.output, rows())
    found = sample_metrics(figures, threshold=rule.threshold if judge is not None else None)
    found |= {"rows": counts["rows"], "kept_prompts": counts["prompts"] / len(figures)}
    found |= length_metrics(*sides, in_pairs=options.selected.keep == "pairs")
    if options.selected.keep == "best" and options.selected.top == 1:
        found["best_of_n_kl"] = best_of_n_kl(options.samples)
    if judge is not None and judge.grader is not None and judge.grader.mass is not None:
        found["grades_mass"] = judge.grader.mass
    return found


def _print_summary(location: str, source: str, options: SampleOptions, found: dict[str, Any]) -> None:
    judge = options.judged.judge or options.judged.judge_model
    names = {"model": location, "prompts_file": source, "judge": judge, "output": str(options.output)}
    note(f"{options.output}: {found['rows']:,} rows of {found['kept_prompts']:.0%} of the prompts")
    if found["rows"] == 0:
        note("note: no answer was kept; sample more, raise --max-new-tokens, lower --threshold, or see --allow-cut")
    if found.get("grades_mass", 1.0) < _LEAST_MASS:
        note(
            f"note: the judge model gives its grades only {found['grades_mass']:.1%} of the probability: it would "
            "answer something else; change --grading-prompt or --grades"
        )
    if options.json:
        say_json(names | {"keep": options.selected.keep} | found)
        return
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in found["dropped"].items())
    say(f"{location}: {found['prompts']:,} prompts, {found['responses']:,} answers{dropped}")
    say(f"judged by {judge}" if judge else "not judged")
    passing = [(name, *figures.values()) for name, figures in found.items() if name.startswith("pass@")]
    if passing:
        say(table(passing, head=("", "rate", "95% from", "to")))
    plain = [(name, value) for name, value in found.items() if isinstance(value, int | float)]
    say(table(plain))
