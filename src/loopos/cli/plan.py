"""`loopos plan`: estimates whether a run fits on a cluster and its network traffic.

The exit code is 0 if it fits and 1 if not. Reads only the architecture; data and weights need not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import say, say_json
from loopos.cli.options import Config, Json, Overrides, TrustRemoteCode, Verbose, option
from loopos.cli.process import hush_libraries
from loopos.config.diagnostics import UserError

if TYPE_CHECKING:
    from loopos.planning.cluster.setting import RequestedSharding

MODES = ("auto", "replicate", "shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The options of `loopos plan`; None: the config's value."""

    gpus: Annotated[int, typer.Option("--gpus", help="Total number of GPUs.", show_default=False)]
    memory: Annotated[str, typer.Option("--memory", help="Memory per GPU, e.g. 80GiB.", show_default=False)]
    gpus_a_node: int = field(default=8, metadata={"help": "GPUs per node."})
    interconnect: str = field(
        default="400Gbit",
        metadata={"help": "Bandwidth per second of a node to other nodes, all network cards together."},
    )
    node_link: str = field(
        default="300GB", metadata={"help": "Bandwidth per second of a GPU to the other GPUs of its node."}
    )
    mode: str | None = field(default=None, metadata={"help": "auto, replicate or shard; default: the config's."})
    shard_size: int | None = field(
        default=None, metadata={"help": "GPUs that shard one copy of the weights; default: all."}
    )
    tensor_parallel: int | None = field(
        default=None, metadata={"help": "GPUs that share each layer's products; default: 1."}
    )
    tokens: int | None = field(default=None, metadata={"help": "Tokens per forward pass; default: full rows."})
    trust_remote_code: TrustRemoteCode = False
    json: Json = False
    verbose: Verbose = False


def run(path: Config, options: PlanOptions, overrides: Overrides = ()) -> int:
    """Prints the plan. Raises `UserError`."""
    from loopos.config.load import load
    from loopos.config.methods import config_classes
    from loopos.planning.cluster.setting import Cluster

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
            raise UserError(f"{option(name)}: got {actual}; expected 1 or more")


def _requested(config: Any, options: PlanOptions) -> RequestedSharding:
    from loopos.planning.cluster.setting import RequestedSharding

    section = config.distributed
    return RequestedSharding(
        mode=options.mode or section.mode,
        shard_size=options.shard_size or section.shard_size,
        tensor_parallel=options.tensor_parallel or section.tensor_parallel,
        cpu_offload=section.cpu_offload,
        reshard_after_forward=section.reshard_after_forward,
    )
