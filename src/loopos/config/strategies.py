"""How an answer is made of chains of reasoning: the names that configs and the command line give.

Enters: one word such as "self_consistency:8". Leaves: a `Strategy`. Left out: the strategies themselves
(`generation.search`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

STRATEGY = re.compile(r"single|(self_consistency|best_of_n):([1-9][0-9]*)|step_beam:([1-9][0-9]*)x([1-9][0-9]*)")
EXAMPLES = ("single", "self_consistency:8", "best_of_n:4", "step_beam:2x4")


@dataclass(frozen=True, slots=True)
class Strategy:
    """`chains`: sampled for each problem (single: 1); of a step beam search `beams` go on, each with `candidates`."""

    kind: Literal["single", "self_consistency", "best_of_n", "step_beam"] = "single"
    chains: int = 1
    beams: int = 1
    candidates: int = 1

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """The strategy of a name. Raises ValueError for another form."""
        found = STRATEGY.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no strategy; wanted one like {', '.join(EXAMPLES)}")
        kind, samples, beams, candidates = found.groups()
        if beams:
            return cls("step_beam", int(beams) * int(candidates), int(beams), int(candidates))
        if samples:
            return cls("best_of_n" if kind == "best_of_n" else "self_consistency", int(samples))
        return cls()
