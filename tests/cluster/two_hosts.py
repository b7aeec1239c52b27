"""Two hosts on one machine: network namespaces of their own, joined by one cable that can be pulled.

Each host has its own name and address and nothing else: no other network, and no process of one can reach the other but
by the cable. They share the file system, as the hosts of a cluster share their storage.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PORT = 29400
# How long a launcher of the c10d rendezvous waits for its store: seconds.
READ_TIMEOUT = 15


def missing() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            return f"needs the program {program}"
    name = f"loopos-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"ip netns add: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def command_of(process: int) -> bytes:
    """The arguments of a process; for a process that has ended, those of a launcher."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b"torch.distributed.run"


@dataclass
class Host:
    """`name`: of the host and of its namespace; `cable`: its end, an interface."""

    name: str
    address: str
    cable: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True, capture_output=True)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a command on this host; its output goes to `log`."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh", *command]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.cable, "OMP_NUM_THREADS": "1"}
        with log.open("ab") as summary:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *inside], env=environment, stdout=summary, stderr=summary
            )
        self.started.append(process)
        return process

    def die(self) -> None:
        """Every process of the host is killed."""
        for process in self.processes():
            os.kill(process, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Every process that runs on this host."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True)
        return [int(line) for line in listed.stdout.split()]

    def trainers(self) -> list[int]:
        """Those of them that train; the others are launchers."""
        return [process for process in self.processes() if b"torch.distributed.run" not in command_of(process)]


@dataclass(frozen=True)
class Cluster:
    """`first` holds the store that the processes meet by."""

    first: Host
    second: Host

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.first, self.second

    def torchrun(self, logs: Path, rendezvous: str, *words: str) -> list[subprocess.Popen[bytes]]:
        """One process a host, of `loopos WORDS`; the launchers, in the hosts' order. Each host's words are in
        `logs`/HOST. rendezvous: "static" or "c10d".
        """
        launchers = []
        for number, host in enumerate(self.hosts):
            place = [f"--node-rank={number}", f"--master-addr={self.first.address}", f"--master-port={PORT}"]
            if rendezvous == "c10d":
                # The hosts have no names that the other could look up.
                conf = f"--rdzv-conf=is_host={int(host is self.first)},read_timeout={READ_TIMEOUT}"
                meeting = [f"--rdzv-endpoint={self.first.address}:{PORT}", "--rdzv-backend=c10d", "--rdzv-id=run"]
                place = [*meeting, conf, f"--local-addr={host.address}"]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *place]
            launchers.append(host.start([*launcher, "-m", "loopos", *words], logs / host.name))
        return launchers

    def pull_cable(self) -> None:
        """The second host is cut off."""
        self.second.ip("link", "set", self.second.cable, "down")

    def plug_cable(self) -> None:
        self.second.ip("link", "set", self.second.cable, "up")

    def wait_until_ended(self, which: Callable[[Host], list[int]], seconds: float) -> dict[str, float]:
        """Waits until no such process is left on either host; by host the seconds that it took. Asserts that it comes."""
        begun, ended = time.monotonic(), dict[str, float]()
        while len(ended) < len(self.hosts):
            now = time.monotonic() - begun
            for host in self.hosts:
                if host.name not in ended and not which(host):
                    ended[host.name] = round(now, 1)
            left = [host.name for host in self.hosts if host.name not in ended]
            assert not left or now < seconds, f"after {now:.0f} s processes are left on {left}"
            time.sleep(0.1)
        return ended


@contextmanager
def two_hosts() -> Iterator[Cluster]:
    """The hosts, joined; every process on them and they themselves are gone at the end, however it comes."""
    number = os.getpid()
    hosts = [
        Host(f"host-{end}-{number}", f"10.77.0.{place}", f"lp{number}{end}") for place, end in ((1, "a"), (2, "b"))
    ]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True, capture_output=True)
        first, second = hosts
        first.ip("link", "add", first.cable, "type", "veth", "peer", "name", second.cable, "netns", second.name)
        for host in hosts:
            host.ip("address", "add", f"{host.address}/24", "dev", host.cable)
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", host.cable, "up")
        yield Cluster(first, second)
    finally:
        for host in hosts:
            if not Path(f"/run/netns/{host.name}").exists():
                continue
            host.die()
            for launcher in host.started:
                launcher.wait(timeout=30)
            subprocess.run(["ip", "netns", "del", host.name], check=True)
