"""`loopos sample`: on-policy data. A model answers every prompt several times, a judge scores the answers, and the best
ones, pairs, groups or all become a file that training reads.

The work is in `rl.rejection_sampling`; a killed command continues where it was when it is run again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import refuse_unwritable, say, say_json, table
from loopos.cli.options import (
    Columns,
    Device,
    Encoding,
    Json,
    LanguageModel,
    Limit,
    Precision,
    Raw,
    Subset,
    System,
    TrustRemoteCode,
    Verbose,
    argument,
    device_diagnostics,
    option,
    parse_columns,
    path,
    refuse,
    text_rules,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.cli.sampling_options import SamplingOptions, changed_fields
from loopos.config.diagnostics import UserError
from loopos.config.paths import expanded
from loopos.config.variants import REWARDS
from loopos.storage.folder_lock import only_writer

if TYPE_CHECKING:
    from loopos.cli.prompts import PromptInput
    from loopos.data.step_format import StepFormat
    from loopos.evaluation.reasoning import Reasoner
    from loopos.models.resolve import ModelRef
    from loopos.rl.rejection_sampling import Judge, RejectionSampler, Request, Speed
    from loopos.rl.selection import SelectionRule

KEEP = ("best", "pairs", "groups", "all")
PAIRS = ("best-worst", "random", "all")
NO_ROOM = "the prompt leaves the model no position for an answer"
CHECKERS = frozenset({"auto", "exact", "numeric", "choice", "math_verify", "reasoning_gym"})
# Below this a judge model does not answer with the grades.
_LEAST_MASS = 0.2

Prompts = Annotated[str, argument("PROMPTS", "One prompt per line, a data file, or - for stdin.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """Who scores the answers; at most one judge."""

    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help="Reward-model run, module:function, or a checker such as numeric.",
            show_default=False,
            parser=expanded,
        ),
    ] = None
    judge_options: Annotated[
        str | None,
        typer.Option("--judge-options", metavar="JSON", help="Options of the reward function that --judge names."),
    ] = None
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", metavar="MODEL", help="Language model that grades the answers.", parser=expanded),
    ] = None
    grading_prompt: Annotated[
        Path | None,
        typer.Option("--grading-prompt", help="Text file with {prompt}, {response} and names of columns.", parser=path),
    ] = None
    grades: Annotated[
        str, typer.Option("--grades", help="Grades of --judge-model: a good and a bad word, or numbers.")
    ] = "yes,no"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOptions:
    """Who writes the answers that MODEL is to learn from."""

    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL_OR_URL",
            help="Answer with this model, or an OpenAI-compatible endpoint, in place of MODEL, which learns from it.",
            parser=expanded,
        ),
    ] = None
    teacher_model: Annotated[
        str | None, typer.Option("--teacher-model", help="Name of the model at the endpoint.", metavar="NAME")
    ] = None
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Environment variable with the key.", metavar="VARIABLE")
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="Keep the K most likely tokens at each place, for distillation.", metavar="K"),
    ] = None

    @property
    def is_endpoint(self) -> bool:
        """Whether the answers come over HTTP."""
        return self.teacher is not None and self.teacher.startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepOptions:
    """Which answers become rows."""

    keep: Annotated[str, typer.Option("--keep", help="best, pairs, groups or all.")] = "best"
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Score from which an answer passes; checkers: 1.")
    ] = None
    min_margin: Annotated[float, typer.Option("--min-margin", help="Minimum difference of the scores of a pair.")] = 0.0
    pairs: Annotated[
        str, typer.Option("--pairs", help="best-worst, random (best against a random worse one) or all.")
    ] = "best-worst"
    top: Annotated[int, typer.Option("--top", help="Maximum answers of a prompt for --keep best.")] = 1
    allow_cut: Annotated[bool, typer.Option("--allow-cut", help="Also choose answers that end at the token limit.")] = (
        False
    )

    def rule(self, threshold: float | None, seed: int) -> SelectionRule:
        """threshold: of the judge, which counts where the option is absent."""
        from loopos.rl.selection import SelectionRule

        return SelectionRule(
            threshold=threshold if self.threshold is None else self.threshold,
            min_margin=self.min_margin,
            pairs=self.pairs,  # type: ignore[arg-type]
            top=self.top,
            allow_cut=self.allow_cut,
            seed=seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """The options of `loopos sample`."""

    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False, parser=path)]
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers to each prompt.")] = 8
    taught: TeacherOptions
    judged: JudgeOptions
    selected: KeepOptions
    sampling: Annotated[
        SamplingOptions,
        Subset(
            ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop", "seed"), defaults={"temperature": 1.0}
        ),
    ]
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk", help="Prompts sampled together, the most that a kill costs; default: enough for 512 answers."
        ),
    ] = None
    limit: Limit = None
    raw: Raw = False
    system: System = None
    columns: Columns = ()
    encoding: Encoding = None
    device: Device = "auto"
    precision: Precision = "auto"
    trust_remote_code: TrustRemoteCode = False
    json: Json = False
    verbose: Verbose = False


def run(location: LanguageModel, source: Prompts, options: SampleOptions) -> int:
    """Samples, judges, selects, writes and prints. Raises `UserError`."""
    from loopos.cli.opened_models import require_language_model

    refuse([*_diagnostics(options)])
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


def _diagnostics(options: SampleOptions) -> Iterator[str]:
    """Messages for invalid options; without torch."""
    judged, selected = options.judged, options.selected
    yield from options.sampling.diagnostics()
    yield from device_diagnostics(options.device, options.precision)
    for name, value in (("samples", options.samples), ("chunk", options.chunk), ("limit", options.limit),
                        ("logprobs", options.taught.logprobs),
                        ("top", selected.top)):  # fmt: skip
        if value is not None and value < 1:
            yield f"{option(name)}: got {value}; expected 1 or more"
    if options.samples > 1 and options.sampling.temperature == 0:
        yield f"--samples {options.samples} at --temperature 0: all answers would be equal; use a temperature above 0"
    yield from _teacher_diagnostics(options)
    if options.taught.logprobs is not None and selected.keep in ("pairs", "groups"):
        yield f"--logprobs with --keep {selected.keep}: distillation reads single answers; use --keep all or best"
    if options.raw and options.system is not None:
        yield "--system with --raw: a raw prompt has no messages; put the text into the prompt"
    if judged.judge is not None and judged.judge_model is not None:
        yield "--judge and --judge-model: use only one of the two"
    yield from _option_diagnostics(judged)
    if judged.judge_model is None:
        for name in changed_fields(judged):
            if name not in ("judge", "judge_options"):
                yield f"{option(name)} without --judge-model: it sets how a language model grades"
    for name, actual, known in (("keep", selected.keep, KEEP), ("pairs", selected.pairs, PAIRS)):
        if actual not in known:
            yield f"{option(name)}: got {actual}; expected one of {', '.join(known)}"
    if judged.judge is None and judged.judge_model is None:
        if selected.keep != "all":
            yield f"--keep {selected.keep}: needs scores; use --judge or --judge-model, or --keep all"
        for name in ("threshold", "allow_cut"):
            if name in changed_fields(selected):
                yield f"{option(name)}: needs scores; use --judge or --judge-model"
    yield from _idle_options(options)


def _option_diagnostics(judged: JudgeOptions) -> Iterator[str]:
    """Messages for --judge-options that are no options of a reward function."""
    if judged.judge_options is None:
        return
    if judged.judge is None or judged.judge in CHECKERS or not _is_function(judged.judge):
        yield "--judge-options: needs a reward function as --judge, such as regex (`loopos list rewards`)"
    try:
        found = json.loads(judged.judge_options)
    except ValueError as problem:
        yield f"--judge-options: not JSON: {problem}"
        return
    if not isinstance(found, dict):
        yield f'--judge-options: got {judged.judge_options}; expected a section such as {{"pattern": "[0-9]+"}}'


def _is_function(name: str) -> bool:
    """Whether --judge names a reward function rather than the folder of a reward model."""
    return name in REWARDS or (":" in name and not os.path.exists(name))


def _teacher_diagnostics(options: SampleOptions) -> Iterator[str]:
    """Options of a teacher that contradict each other."""
    taught = options.taught
    if not taught.is_endpoint:
        for name in ("teacher_model", "api_key_env"):
            if getattr(taught, name) is not None:
                yield f"{option(name)}: needs an endpoint; use --teacher http://HOST/v1"
        return
    if taught.teacher_model is None:
        yield "--teacher with a URL: needs the name of the model there; use --teacher-model"
    if taught.logprobs is not None:
        yield "--logprobs with an endpoint: its tokens may be others than MODEL's; use --teacher with a model"
    if options.raw:
        yield "--raw with an endpoint: it answers messages; leave --raw out"
    for name in changed_fields(options.sampling):
        if name in ("top_k", "min_p"):
            yield f"{option(name)} with an endpoint: OpenAI's API has no such setting"


def _idle_options(options: SampleOptions) -> Iterator[str]:
    """Options that --keep or a single answer gives no effect."""
    selected = options.selected
    uses = {"pairs": ("pairs",), "min_margin": ("pairs",), "top": ("best",), "threshold": ("best", "pairs", "all"),
            "allow_cut": ("best", "pairs", "all")}  # fmt: skip
    for name in changed_fields(selected):
        if name in uses and selected.keep in KEEP and selected.keep not in uses[name]:
            yield f"{option(name)} with --keep {selected.keep}: it belongs to --keep {' or '.join(uses[name])}"
    if selected.min_margin < 0:
        yield f"--min-margin: got {selected.min_margin:g}; expected 0 or more"
    if selected.keep in ("pairs", "groups") and options.samples == 1:
        yield f"--keep {selected.keep} with --samples 1: two answers are compared; use --samples 2 or more"


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
    if not _is_function(name):
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
