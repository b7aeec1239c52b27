"""`loopos plan`: estimates whether a run fits on a cluster and its network traffic.

The exit code is 0 if it fits and 1 if not. Reads only the architecture; data and weights need not exist.
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
from loopos.planning.cluster.setting import Cluster, RequestedSharding

MODES = ("auto", "replicate", "shard")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of `loopos plan`; None: the config's value."""

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
    plans = [plan_of(each, _requested(config, options), cluster) for each in loads]
    fits = all(plan.fits for plan in plans)
    if options.json:
        say_json({"fits": fits, "phases": [plan.to_dict() for plan in plans]})
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


def _requested(config: Any, options: PlanOptions) -> RequestedSharding:
    section: DistributedSection = config.distributed
    return RequestedSharding(
        mode=options.mode or section.mode,
        shard_size=options.shard_size or section.shard_size,
        tensor_parallel=options.tensor_parallel or section.tensor_parallel,
        cpu_offload=section.cpu_offload,
        reshard_after_forward=section.reshard_after_forward,
    )
