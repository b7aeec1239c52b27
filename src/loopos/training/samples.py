"""What a model said at each validation: `samples.jsonl`, a line a problem.

Enters: a step and records. Leaves: the file, with the steps before and this one. Left out: what a record holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from loopos.config.faults import UserError
from loopos.storage.durable import JSON, disk_full_said, write_whole
from loopos.storage.json_files import json_text


def write_samples(file: Path, step: int, records: Iterable[Mapping[str, JSON]]) -> None:
    """Puts the records of a step behind those of earlier ones. Lines of this step or later, as a killed run leaves
    them, go: a resumed run writes them again. The file is replaced at once. Raises `DiskFull`, and `UserError` for a
    file that is broken.
    """
    earlier = [line for at, line in _written(file) if at < step]
    lines = [*earlier, *(json_text({"step": step, **told}) for told in records)]
    with disk_full_said(file, sum(map(len, lines)), "the samples"):
        write_whole(file, "".join(f"{line}\n" for line in lines).encode())


def _written(file: Path) -> Iterator[tuple[int, str]]:
    """Step and line of what is there."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            text = line.decode()
            yield int(json.loads(text)["step"]), text
        except (ValueError, TypeError, KeyError) as problem:
            raise UserError(
                f"{file}:{number}: not a sample of this run ({problem}); it was changed after the run wrote it: "
                "restore it, or move it away"
            ) from problem
