"""What docs/cluster.md shows is right: manifests parse, scripts too, and every command is one that is there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from loopos.cli.commands import app
from loopos.config.sections import DistributedSection

DOCS = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, flags=re.DOTALL | re.MULTILINE)


def manifests() -> list[dict[str, Any]]:
    return [part for block in blocks("yaml") for part in yaml.safe_load_all(block)]


def launched() -> list[list[str]]:
    """The arguments of `torchrun` in shell lines and manifests."""
    found = []
    for manifest in manifests():
        for command in re.findall(r"'command': (\[.*?\])", repr(manifest)):
            found.append(yaml.safe_load(command))
    for block in [*blocks("bash"), *blocks("")]:
        joined = block.replace("\\\n", " ")
        found += [
            shlex.split(line.strip().rstrip("'")) for line in joined.splitlines() if line.strip().startswith("torchrun")
        ]
    found += [shlex.split(line) for line in re.findall(r"`(torchrun [^`]*-m loopos[^`]*)`", DOCS)]
    return [words[1:] for words in found if words[0] == "torchrun"]


def called() -> list[list[str]]:
    """The arguments of `loopos`, including the commands that torchrun starts."""
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("loopos ")]
    lines += [manifest["spec"]["entrypoint"] for manifest in manifests() if "entrypoint" in manifest["spec"]]
    behind = [words[words.index("loopos") + 1 :] for words in launched()]
    return [shlex.split(line)[1:] for line in lines] + behind


def test_the_manifests_are_these() -> None:
    assert [manifest["kind"] for manifest in manifests()] == ["Service", "Job", "PyTorchJob", "RayJob"]
    assert all(manifest["metadata"]["name"] and manifest["apiVersion"] for manifest in manifests())
    service, job = manifests()[:2]
    # The first pod is found by the name that the launcher is told.
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert f"--master-addr={job['metadata']['name']}-0.{service['metadata']['name']}" in container["command"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}


def test_scripts_are_shell() -> None:
    (script,) = blocks("bash")
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_torchrun_arguments_of_the_docs_exist() -> None:
    assert len(launched()) >= 5
    for words in launched():
        # Variables of a shell or a pod, as the numbers that they stand for.
        told = [re.sub(r"\$\(\w+\)|\$\w+", "1", word) for word in words]
        parsed = get_args_parser().parse_args(told)
        assert (parsed.module, parsed.training_script) == (True, "loopos")


def test_the_loopos_arguments_of_the_docs_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert len(called()) >= 9
    for name, *words in called():
        known = {option for parameter in commands[name].params for option in parameter.opts}
        actual = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert actual <= known, (name, actual - known)


@pytest.mark.parametrize("key", DistributedSection.model_fields)
def test_every_key_of_distributed_is_documented(key: str) -> None:
    assert f"`{key}" in DOCS
