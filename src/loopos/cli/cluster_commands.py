"""The command `plan`: options and help texts."""

from __future__ import annotations

from typing import Annotated

import typer

from loopos.cli import option_types as of


def plan(
    config: of.Config,
    gpus: Annotated[int, typer.Option("--gpus", help="Total number of GPUs.", show_default=False)],
    memory: Annotated[str, typer.Option("--memory", help="Memory per GPU, e.g. 80GiB.", show_default=False)],
    overrides: of.Overrides = None,
    gpus_a_node: Annotated[int, typer.Option("--gpus-a-node", help="GPUs per node.")] = 8,
    interconnect: Annotated[
        str,
        typer.Option(
            "--interconnect", help="Bandwidth per second of a node to other nodes, all network cards together."
        ),
    ] = "400Gbit",
    node_link: Annotated[
        str, typer.Option("--node-link", help="Bandwidth per second of a GPU to the other GPUs of its node.")
    ] = "300GB",
    mode: Annotated[str | None, typer.Option("--mode", help="auto, replicate or shard; default: the config's.")] = None,
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", help="GPUs that shard one copy of the weights; default: all.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", help="GPUs that share each layer's products; default: 1.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens per forward pass; default: full rows.")] = None,
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
