"""JSON Lines that grow chunk by chunk: a killed process loses only the chunk that it was working on.

The first line may be a header, `{"header": {...}}`, that states what the lines were made from. Each chunk is synced to
disk. Opening keeps the whole chunks and drops the rest. torch is not imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.storage.durable import fsync_path, names_file
from loopos.storage.json_files import json_text


class HeaderDiffers(UserError):
    """The lines were made from something else. `differences`: each key with its value in the file and the new one."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]]) -> None:
        self.differences = differences
        super().__init__(f"{path}: made with other settings: {', '.join(differences)}")


class ChunkedLines:
    """A file of `sum(sizes)` lines, in chunks of these sizes. As a context it closes the file."""

    def __init__(self, path: Path, sizes: Sequence[int], header: Mapping[str, Any] | None = None) -> None:
        """header: written into a new file; an existing one must have the same. Raises `HeaderDiffers`, `OSError`."""
        self.path, self._sizes = path, sizes
        with names_file(path):
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._starts = [self._after_header(header)]
            self._find_whole_chunks()
            self._file.truncate(self._starts[-1])
            self._file.seek(self._starts[-1])

    def __enter__(self) -> ChunkedLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def num_chunks(self) -> int:
        """The number of whole chunks."""
        return len(self._starts) - 1

    def append(self, values: Sequence[Any]) -> None:
        """Writes the next chunk and syncs it. Raises `OSError`."""
        assert len(values) == self._sizes[self.num_chunks], (len(values), self.num_chunks)
        self._write("".join(json_text(value) + "\n" for value in values))
        self._starts.append(self._file.tell())

    def chunk(self, index: int) -> list[Any]:
        """The values of a whole chunk. Raises `UserError` for lines that are not JSON."""
        start, end = self._starts[index : index + 2]
        with names_file(self.path):
            self._file.seek(start)
            lines = self._file.read(end - start).splitlines()
            self._file.seek(self._starts[-1])
        try:
            return [json.loads(line) for line in lines]
        except ValueError as problem:
            raise UserError(f"{self.path}: damaged: {problem}; delete it and run the command again") from problem

    def _after_header(self, header: Mapping[str, Any] | None) -> int:
        """Where the chunks begin; a header that is missing or torn starts the file anew."""
        if header is None:
            return 0
        line = self._file.readline()
        if not line.endswith(b"\n"):
            self._file.truncate(0)
            self._file.seek(0)
            self._write(json_text({"header": header}) + "\n")
            fsync_path(self.path.parent)
            return self._file.tell()
        try:
            actual = json.loads(line)["header"]
            names = dict.fromkeys([*actual, *header])
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{self.path}: damaged: its first line is no header; delete it and run again") from problem
        # As JSON, because a tuple is a list there.
        expected = json.loads(json.dumps(header))
        differences = {
            name: (actual.get(name), expected.get(name)) for name in names if actual.get(name) != expected.get(name)
        }
        if differences:
            self._file.close()
            raise HeaderDiffers(self.path, differences)
        return len(line)

    def _find_whole_chunks(self) -> None:
        position = self._starts[0]
        self._file.seek(position)
        for size in self._sizes:
            for _ in range(size):
                line = self._file.readline()
                if not line.endswith(b"\n"):
                    return
                position += len(line)
            self._starts.append(position)

    def _write(self, text: str) -> None:
        with names_file(self.path):
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
