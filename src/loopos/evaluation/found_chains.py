"""Self-improvement (STaR, Zelikman et al. 2022): samples chains for problems with known answers and keeps correct ones.

A file with one line per problem grows chunk by chunk, so that a killed run samples only the missing chunks, with equal
results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loopos.config.chain_of_thought import SelfImprovementSection
from loopos.config.diagnostics import UserError
from loopos.data.demonstrations import Demonstration
from loopos.data.step_format import StepFormat
from loopos.evaluation.answer_check import AnswerCheck
from loopos.evaluation.checkers import Verdict, judge
from loopos.evaluation.reasoning import Answered
from loopos.generation.settings import SamplingParams
from loopos.storage.chunked_lines import ChunkedLines

# Problems sampled together; a killed run restarts with the first incomplete chunk.
_CHUNK = 64
_HINT = "\n\n(The answer is {answer}. Show the steps that lead to it.)"
"""Appended to a problem whose chains were all wrong, if rationalization is enabled (section 3.2)."""


@dataclass(frozen=True)
class RationaleReport:
    """`chains`: correct and distinct; `sampled`: all chains; `solved`: problems with at least one correct chain;
    `hinted`: of these, only with the hint.
    """

    chains: list[Demonstration]
    sampled: int
    problems: int
    solved: int
    hinted: int

    @classmethod
    def combined(cls, parts: Sequence[RationaleReport]) -> RationaleReport:
        """The combined report of several processes."""
        return cls(
            [chain for part in parts for chain in part.chains],
            sum(part.sampled for part in parts),
            sum(part.problems for part in parts),
            sum(part.solved for part in parts),
            sum(part.hinted for part in parts),
        )

    def summary(self) -> str:
        """The counts as a sentence."""
        hinted = f" ({self.hinted} with the answer as a hint)" if self.hinted else ""
        return (
            f"{self.sampled} chains sampled for {self.problems} problems; {self.solved} solved{hinted}, "
            f"{len(self.chains)} correct and distinct chains kept"
        )


def find_chains(
    folder: Path,
    check: AnswerCheck,
    examples: Sequence[Demonstration],
    section: SelfImprovementSection,
    *,
    number: int,
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[object], list[object]] = lambda value: [value],
    say: Callable[[str], None] = lambda sentence: None,
) -> RationaleReport:
    """Samples `section.samples_per_problem` chains for every problem, or reads those already in `folder`; all ranks
    return all chains.

    number: of the round; rounds use different random numbers. shard: (rank, world_size): this process takes every
    `world_size`-th chunk; gather(value) returns the values of all ranks. Raises `UserError` if no chain is correct,
    `OSError` if the disk is full.
    """
    rank, world_size = shard
    own = [examples[i : i + _CHUNK] for i in range(rank * _CHUNK, len(examples), world_size * _CHUNK)]
    settings = replace(check.sampling, temperature=section.temperature, seed=check.seed + number)
    sampler = _Sampler(check, section, settings)
    position, total = 0, sum(map(len, own))
    records: list[dict[str, Any]] = []
    with ChunkedLines(folder / f"chains-{rank}-of-{world_size}.jsonl", [len(chunk) for chunk in own]) as file:
        for index, chunk in enumerate(own):
            position += len(chunk)
            if index == file.num_chunks:
                file.append(sampler.sample(chunk))
                say(f"round {number}: {position} of {total} problems sampled")
            records += file.chunk(index)
    found = _read(records, [example for chunk in own for example in chunk], section.samples_per_problem)
    combined = RationaleReport.combined([part for part in gather(found) if isinstance(part, RationaleReport)])
    if not combined.chains:
        raise UserError(
            f"self_improvement: {combined.summary()}; train longer before the first round, raise "
            "self_improvement.samples_per_problem, or set self_improvement.rationalize to true"
        )
    return combined


class _Sampler:
    """Samples correct chains for problems, chunk by chunk."""

    def __init__(self, check: AnswerCheck, section: SelfImprovementSection, settings: SamplingParams) -> None:
        self._check, self._section, self._settings = check, section, settings

    def sample(self, chunk: Sequence[Demonstration]) -> list[dict[str, Any]]:
        """The lines of the file for a chunk of problems."""
        found = self._right_chains(chunk, [example.problem for example in chunk])
        lines = [
            {"problem": example.problem, "right": right, "chains": chains, "hinted": False}
            for example, (right, chains) in zip(chunk, found, strict=True)
        ]
        unsolved = [index for index, (_, chains) in enumerate(found) if not chains]
        if self._section.rationalize and unsolved:
            hard = [chunk[index] for index in unsolved]
            hinted = self._right_chains(hard, [e.problem + _HINT.format(answer=e.answer) for e in hard])
            for index, (_, chains) in zip(unsolved, hinted, strict=True):
                lines[index] |= {"chains": chains, "hinted": bool(chains)}
        return lines

    def _right_chains(
        self, examples: Sequence[Demonstration], texts: Sequence[str]
    ) -> list[tuple[int, list[list[str]]]]:
        """(number of correct chains, steps of the distinct ones) for each problem, with these problem texts."""
        reasoner, limits = self._check.reasoner, self._check.limits
        prompts = [reasoner.prompt(replace(e, problem=text)) for e, text in zip(examples, texts, strict=True)]
        answered = reasoner.sample(prompts, self._settings, n=self._section.samples_per_problem, limits=limits)
        return [self._correct_chains(found, example) for found, example in zip(answered, examples, strict=True)]

    def _correct_chains(self, found: Answered, example: Demonstration) -> tuple[int, list[list[str]]]:
        step_format = self._check.reasoner.step_format
        verdicts = judge(
            found.samples(),
            example.answer,
            example.row.values,
            step_format=step_format,
            checker=self._check.checker,
            location=example.row.location,
        )
        right = [verdict for verdict in verdicts if _teaches(verdict, example, step_format)]
        distinct: dict[tuple[str, ...], list[str]] = {}
        for verdict in right:
            steps = [step.strip() for step in verdict.parsed.steps]
            distinct.setdefault(tuple(" ".join(step.split()) for step in steps), steps)
        return len(right), list(distinct.values())


def _teaches(verdict: Verdict, example: Demonstration, step_format: StepFormat) -> bool:
    """Correct, complete, with steps, and of a form that can be rendered again."""
    steps = [step.strip() for step in verdict.parsed.steps]
    whole = verdict.is_right and verdict.parsed.well_formed and verdict.sample.ended
    return whole and bool(steps) and step_format.problem(steps, example.answer) is None


def _read(records: Sequence[Mapping[str, Any]], examples: Sequence[Demonstration], samples: int) -> RationaleReport:
    assert len(records) == len(examples), (len(records), len(examples))
    chains = [
        replace(example, steps=tuple(steps))
        for example, line in zip(examples, records, strict=True)
        for steps in line["chains"]
    ]
    return RationaleReport(
        chains,
        sampled=samples * len(examples),
        problems=len(examples),
        solved=sum(bool(line["chains"]) for line in records),
        hinted=sum(line["hinted"] for line in records),
    )
