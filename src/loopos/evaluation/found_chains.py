"""Chains that a model finds by itself for problems with known answers: sampled, checked, the right ones kept (STaR,
Zelikman et al. 2022).

Enters: how answers are generated and checked, demonstrations. Leaves: a file with a line a problem, and the kept chains
as demonstrations. The file grows chunk by chunk, so that a killed run samples only what is missing, and the same again.
Left out: training on them (`methods`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
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
from loopos.generation.settings import SamplingSettings

# Problems that are sampled together; a killed run begins with the first chunk that is not whole.
_CHUNK = 64
_HINT = "\n\n(The answer is {answer}. Show the steps that lead to it.)"
"""What is put behind a problem whose chains were all wrong, where rationalisation is asked for (section 3.2)."""


@dataclass(frozen=True)
class RationaleReport:
    """`chains`: right and distinct; `sampled`: chains in all; `solved`: problems with at least one; `hinted`: of these,
    by the hint alone.
    """

    chains: list[Demonstration]
    sampled: int
    problems: int
    solved: int
    hinted: int

    @classmethod
    def joined(cls, parts: Sequence[RationaleReport]) -> RationaleReport:
        """What several processes found, as one."""
        return cls(
            [chain for part in parts for chain in part.chains],
            sum(part.sampled for part in parts),
            sum(part.problems for part in parts),
            sum(part.solved for part in parts),
            sum(part.hinted for part in parts),
        )

    def summary(self) -> str:
        """The account in words."""
        hinted = f" ({self.hinted} with the answer as a hint)" if self.hinted else ""
        return (
            f"{self.sampled} chains sampled for {self.problems} problems; {self.solved} solved{hinted}, "
            f"{len(self.chains)} right and distinct chains kept"
        )


def find_chains(
    folder: Path,
    check: AnswerCheck,
    examples: Sequence[Demonstration],
    section: SelfImprovementSection,
    *,
    number: int,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[object], list[object]] = lambda value: [value],
    say: Callable[[str], None] = lambda told: None,
) -> RationaleReport:
    """Samples `section.samples_per_problem` chains for every problem, or reads those that `folder` has already; all
    ranks return all chains.

    number: of the round, whose samples differ from those of others. share: (rank, ranks): this process takes every
    `ranks`-th chunk; gather(value) gives the values of all ranks. Raises `UserError` where no chain is right, `OSError`
    when the disk is full.
    """
    rank, ranks = share
    mine = [examples[i : i + _CHUNK] for i in range(rank * _CHUNK, len(examples), ranks * _CHUNK)]
    settings = replace(check.sampling, temperature=section.temperature, seed=check.seed + number)
    sampler = _Sampler(check, section, settings)
    file = folder / f"chains-{rank}-of-{ranks}.jsonl"
    lines = _whole_chunks(file, [len(chunk) for chunk in mine])
    done, place, total = len(lines), 0, sum(map(len, mine))
    with file.open("r+b" if file.exists() else "wb") as out:
        out.truncate(sum(len(line) for line in lines))
        out.seek(0, os.SEEK_END)
        for chunk in mine:
            place += len(chunk)
            if place <= done:
                continue
            new = [json.dumps(told).encode() + b"\n" for told in sampler.sample(chunk)]
            out.write(b"".join(new))
            out.flush()
            os.fsync(out.fileno())
            lines += new
            say(f"round {number}: {place} of {total} problems sampled")
    found = _read(lines, [example for chunk in mine for example in chunk], section.samples_per_problem)
    joined = RationaleReport.joined([part for part in gather(found) if isinstance(part, RationaleReport)])
    if not joined.chains:
        raise UserError(
            f"self_improvement: {joined.summary()}; train longer before the first round, raise "
            "self_improvement.samples_per_problem, or set self_improvement.rationalise to true"
        )
    return joined


def _whole_chunks(file: Path, sizes: Sequence[int]) -> list[bytes]:
    """The lines of the chunks that are there whole."""
    if not file.exists():
        return []
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    whole = 0
    for size in sizes:
        if whole + size > len(lines):
            break
        whole += size
    return lines[:whole]


class _Sampler:
    """Right chains for problems, chunk by chunk."""

    def __init__(self, check: AnswerCheck, section: SelfImprovementSection, settings: SamplingSettings) -> None:
        self._check, self._section, self._settings = check, section, settings

    def sample(self, chunk: Sequence[Demonstration]) -> list[dict[str, Any]]:
        """What the file holds of each problem of a chunk."""
        found = self._right_chains(chunk, [example.problem for example in chunk])
        told = [
            {"problem": example.problem, "right": right, "chains": chains, "hinted": False}
            for example, (right, chains) in zip(chunk, found, strict=True)
        ]
        unsolved = [place for place, (_, chains) in enumerate(found) if not chains]
        if self._section.rationalise and unsolved:
            hard = [chunk[place] for place in unsolved]
            hinted = self._right_chains(hard, [e.problem + _HINT.format(answer=e.answer) for e in hard])
            for place, (_, chains) in zip(unsolved, hinted, strict=True):
                told[place] |= {"chains": chains, "hinted": bool(chains)}
        return told

    def _right_chains(
        self, examples: Sequence[Demonstration], asked: Sequence[str]
    ) -> list[tuple[int, list[list[str]]]]:
        """(number of right chains, the distinct ones' steps) of each problem, asked in these words."""
        reasoner, limits = self._check.reasoner, self._check.limits
        prompts = [reasoner.prompt(replace(e, problem=text)) for e, text in zip(examples, asked, strict=True)]
        answered = reasoner.sample(prompts, self._settings, n=self._section.samples_per_problem, limits=limits)
        return [self._kept(found, example) for found, example in zip(answered, examples, strict=True)]

    def _kept(self, found: Answered, example: Demonstration) -> tuple[int, list[list[str]]]:
        step_format = self._check.reasoner.step_format
        verdicts = judge(
            found.samples(),
            example.answer,
            example.row.values,
            step_format=step_format,
            checker=self._check.checker,
            place=example.row.location,
        )
        right = [verdict for verdict in verdicts if _teaches(verdict, example, step_format)]
        distinct: dict[tuple[str, ...], list[str]] = {}
        for verdict in right:
            steps = [step.strip() for step in verdict.parsed.steps]
            distinct.setdefault(tuple(" ".join(step.split()) for step in steps), steps)
        return len(right), list(distinct.values())


def _teaches(verdict: Verdict, example: Demonstration, step_format: StepFormat) -> bool:
    """Right, whole, reasoned, and of a form that can be written again."""
    steps = [step.strip() for step in verdict.parsed.steps]
    whole = verdict.is_right and verdict.parsed.well_formed and verdict.sample.ended
    return whole and bool(steps) and step_format.problem(steps, example.answer) is None


def _read(lines: Sequence[bytes], examples: Sequence[Demonstration], samples: int) -> RationaleReport:
    assert len(lines) == len(examples), (len(lines), len(examples))
    told = [json.loads(line) for line in lines]
    chains = [
        replace(example, steps=tuple(steps))
        for example, line in zip(examples, told, strict=True)
        for steps in line["chains"]
    ]
    return RationaleReport(
        chains,
        sampled=samples * len(examples),
        problems=len(examples),
        solved=sum(bool(line["chains"]) for line in told),
        hinted=sum(line["hinted"] for line in told),
    )
