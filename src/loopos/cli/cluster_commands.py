"""The command that plans runs on clusters.

Enters: the words of a command line. Leaves: the exit code. As in `commands`, here stand names, options and help alone.
"""

from __future__ import annotations

from typing import Annotated

import typer

from loopos.cli import option_types as of


def plan(
    config: of.Config,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of all nodes.", show_default=False)],
    memory: Annotated[str, typer.Option("--memory", help="Memory of a GPU, as 80GiB.", show_default=False)],
    overrides: of.Overrides = None,
    gpus_a_node: Annotated[int, typer.Option("--gpus-a-node", help="GPUs of a node.")] = 8,
    interconnect: Annotated[
        str, typer.Option("--interconnect", help="What a node sends to others, by all its network cards a second.")
    ] = "400Gbit",
    node_link: Annotated[
        str, typer.Option("--node-link", help="What a GPU sends to the others of its node a second.")
    ] = "300GB",
    mode: Annotated[
        str | None, typer.Option("--mode", help="auto, replicate or shard; the config's when absent.")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", help="GPUs that share one copy of the weights; all when absent.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", help="GPUs that share each layer's products; 1 when absent.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Tokens of a forward pass; full rows when absent.")
    ] = None,
    trust_remote_code: of.TrustRemoteCode = False,
    json: of.Json = False,
    verbose: of.Verbose = False,
) -> None:
    """Estimate memory and network traffic on a cluster."""
    from loopos.cli import plan as command

    options = command.PlanOptions(
        gpus, memory, gpus_a_node, interconnect, node_link, mode, shard_size, tensor_parallel, tokens,
        trust_remote_code, json, verbose,
    )  # fmt: skip
    raise typer.Exit(command.run(config, overrides or [], options))
