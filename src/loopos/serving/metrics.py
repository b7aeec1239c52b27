"""A server's metrics in Prometheus' text format (version 0.0.4), for /metrics.

The format is a dozen lines; a library would be a dependency with a registry of its own for the process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass
class Histogram:
    """Seconds by upper bound; the last count is of values above every bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_BUCKETS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: str) -> list[str]:
        """Lines of the format; labels: `name="value"` pairs with commas between, or nothing."""
        before = f"{labels}," if labels else ""
        own = f"{{{labels}}}" if labels else ""
        lines, below = [], 0
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{{before}le="{bound}"}} {below}')
        return [*lines, f"{name}_sum{own} {self.total:.6f}", f"{name}_count{own} {below}"]


class ServingMetrics:
    """Counts since the server started. `gauges`: name → its help text, and a function that reads its value."""

    def __init__(self) -> None:
        self.prompt_tokens, self.generated_tokens, self.malformed_calls = 0, 0, 0
        self.requests: Counter[tuple[str, int]] = Counter()
        self.cut: Counter[str] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.first_token = Histogram()
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def ended(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a finished request to an endpoint."""
        self.requests[endpoint, status] += 1
        self.seconds.setdefault(endpoint, Histogram()).observe(seconds)

    def text(self) -> str:
        """All metrics in Prometheus' format."""
        counters: Mapping[str, tuple[str, Mapping[str, int]]] = {
            "loopos_requests_total": (
                "Requests that are over, by endpoint and status.",
                {f'endpoint="{e}",status="{s}"': count for (e, s), count in sorted(self.requests.items())},
            ),
            "loopos_cut_total": (
                "Connections that the server cut, by reason.",
                {f'reason="{reason}"': count for reason, count in sorted(self.cut.items())},
            ),
            "loopos_prompt_tokens_total": ("Tokens of prompts and inputs.", {"": self.prompt_tokens}),
            "loopos_generated_tokens_total": ("Tokens generated.", {"": self.generated_tokens}),
            "loopos_malformed_tool_calls_total": ("Tool calls that cannot be read.", {"": self.malformed_calls}),
        }
        lines: list[str] = []
        for name, (description, values) in counters.items():
            lines += _head(name, description, "counter")
            lines += [
                f"{name}{{{labels}}} {count}" if labels else f"{name} {count}" for labels, count in values.items()
            ]
        for name, (description, read) in self.gauges.items():
            lines += [*_head(name, description, "gauge"), f"{name} {read():g}"]
        lines += _head("process_resident_memory_bytes", "Memory of the process.", "gauge")
        lines.append(f"process_resident_memory_bytes {psutil.Process().memory_info().rss}")
        lines += _head("loopos_request_seconds", "Seconds from a request to the end of its answer.", "histogram")
        for endpoint, histogram in sorted(self.seconds.items()):
            lines += histogram.lines("loopos_request_seconds", f'endpoint="{endpoint}"')
        lines += _head("loopos_first_token_seconds", "Seconds from a request to its first token.", "histogram")
        lines += self.first_token.lines("loopos_first_token_seconds", "")
        return "\n".join(lines) + "\n"


def _head(name: str, description: str, kind: str) -> list[str]:
    return [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
