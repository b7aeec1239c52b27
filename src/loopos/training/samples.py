"""What a model said at each validation: `samples.jsonl`, a line a problem.

Enters: a step and records. Leaves: the file, with the steps before and this one. Left out: what a record holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from loopos.data.decoding import split_lines
from loopos.storage.durable import JSON, disk_full_said
from loopos.storage.json_files import json_text


def write_samples(file: Path, step: int, records: Iterable[Mapping[str, JSON]]) -> None:
    """Puts the records of a step behind those of earlier ones. Lines of this step or later, as a killed run leaves
    them, go: a resumed run writes them again. The file is replaced at once. Raises `DiskFull`.
    """
    earlier = []
    if file.is_file():
        for line in split_lines(file.read_text(encoding="utf-8")):
            if json.loads(line)["step"] < step:
                earlier.append(line)
    lines = [*earlier, *(json_text({"step": step, **told}) for told in records)]
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    with disk_full_said(file, sum(map(len, lines)), "the samples"):
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(file)
