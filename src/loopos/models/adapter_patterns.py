"""The regular expressions of an adapter's config, matched against the names of modules in bounded time.

Enters: expressions that anybody may have written, and names. Leaves: which names each one matches. An expression can
take longer than the age of the world on a short name, and nothing in Python ends it within a process: those that
repeat anything run in a process of their own, which is ended after a few seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loopos.config.faults import UserError

TIME_LIMIT = 5.0
"""Seconds that all expressions of an adapter together may take."""
# How peft reads them, by the key of its config.
_FORMS = {
    "target_modules": r"(?:{})\Z",
    "exclude_modules": r"(?:{})\Z",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_REPEATS = re.compile(r"[*+{]")
_CHILD = """
import json, re, sys
names, patterns = json.load(sys.stdin)
for key, pattern, form in patterns:
    print(json.dumps([key, pattern]), flush=True)
    compiled = re.compile(form.replace("{}", pattern))
    print(json.dumps([place for place, name in enumerate(names) if compiled.match(name)]), flush=True)
"""


def matches(file: Path, patterns: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[tuple[str, str], set[str]]:
    """(key, expression) → the names that it matches, as peft reads the expressions under a key of its config. file: the
    config, for messages. Raises `UserError` for an expression that is none, or takes longer than `TIME_LIMIT`.
    """
    found: dict[tuple[str, str], set[str]] = {}
    slow = []
    for key, each in ((key, each) for key, several in patterns.items() for each in several):
        try:
            compiled = re.compile(_FORMS[key].replace("{}", each))
        except (re.error, OverflowError, RecursionError) as problem:
            raise UserError(f"{file}: {key}: expected a regular expression, got {_shown(each)}: {problem}") from problem
        if _REPEATS.search(each):
            slow.append((key, each, _FORMS[key]))
        else:
            found[key, each] = {name for name in names if compiled.match(name)}
    return found | _matched_apart(file, slow, names) if slow else found


def _matched_apart(
    file: Path, patterns: Sequence[tuple[str, str, str]], names: Sequence[str]
) -> dict[tuple[str, str], set[str]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([list(names), patterns]),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=True,
        )
    except subprocess.TimeoutExpired as problem:
        lines = (problem.stdout or b"").decode().splitlines()
        key, pattern = json.loads(lines[-1]) if lines and lines[-1].startswith('["') else patterns[0][:2]
        raise UserError(
            f"{file}: {key}: {_shown(pattern)} takes over {TIME_LIMIT:g} seconds to match the names of the model's "
            "modules; expected a simpler regular expression"
        ) from problem
    except subprocess.CalledProcessError as problem:
        last = (problem.stderr.splitlines() or ["no reason"])[-1]
        raise UserError(f"{file}: its regular expressions cannot be matched: {last}") from problem
    lines = done.stdout.splitlines()
    return {
        (key, pattern): {names[place] for place in json.loads(line)}
        for (key, pattern, _), line in zip(patterns, lines[1::2], strict=True)
    }


def _shown(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 60 else f"{pattern[:57]!r}..."
