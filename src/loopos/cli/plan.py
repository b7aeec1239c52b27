"""`loopos plan`: whether a run fits on a cluster, and what it sends, before anything is bought or queued.

Enters: a config and what a cluster is. Leaves: the plan on standard output, and the exit code: 0 where it fits, 1 where
it does not. Data and weights are not read, and need not be there: the architecture alone is. Left out: the formulas
(`cluster`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.cli.answers import say, say_json
from loopos.cli.quiet import hush_libraries
from loopos.config.diagnostics import UserError
from loopos.config.load import load
from loopos.config.methods import config_classes
from loopos.config.sections import DistributedSection
from loopos.planning.cluster.setting import Asked, Cluster

MODES = ("auto", "replicate", "shard")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of `loopos plan`; None leaves a value to the config."""

    gpus: int
    memory: str
    gpus_a_node: int
    interconnect: str
    node_link: str
    mode: str | None
    shard_size: int | None
    tensor_parallel: int | None
    tokens: int | None
    trust_remote_code: bool
    json: bool
    verbose: bool


def run(path: Path, overrides: Sequence[str], options: PlanOptions) -> int:
    """Prints the plan. Raises `UserError`."""
    config: Any = load(path, overrides, config_classes(), check_files=False).config
    _check(options)
    cluster = Cluster.of(
        gpus=options.gpus,
        memory=options.memory,
        gpus_a_node=options.gpus_a_node,
        inside=options.node_link,
        between=options.interconnect,
    )
    hush_libraries(verbose=options.verbose)
    from loopos.planning.cluster.plan import described, plan_of
    from loopos.planning.cluster.work import loads_of

    loads = loads_of(config, tokens=options.tokens, trust_remote_code=options.trust_remote_code)
    plans = [plan_of(each, _asked(config, options), cluster) for each in loads]
    fits = all(plan.fits for plan in plans)
    if options.json:
        say_json({"fits": fits, "phases": [plan.told() for plan in plans]})
    else:
        say(described(plans))
    return 0 if fits else 1


def _check(options: PlanOptions) -> None:
    if options.mode is not None and options.mode not in MODES:
        raise UserError(f"--mode: got {options.mode!r}; expected one of {', '.join(MODES)}")
    for name in ("shard_size", "tensor_parallel", "tokens"):
        actual = getattr(options, name)
        if actual is not None and actual < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {actual}; expected 1 or more")


def _asked(config: Any, options: PlanOptions) -> Asked:
    told: DistributedSection = config.distributed
    return Asked(
        mode=options.mode or told.mode,
        shard_size=options.shard_size or told.shard_size,
        tensor_parallel=options.tensor_parallel or told.tensor_parallel,
        cpu_offload=told.cpu_offload,
        reshard_after_forward=told.reshard_after_forward,
    )
