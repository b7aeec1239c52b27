"""What a run resumes from, found and held against the run, before anything is changed.

Enters: a run's folder, its config, its identity. Leaves: the newest whole checkpoint with its log, the settings that
have changed since and what the user is to know; or a refusal. Left out: the restoring itself (`run_state.py`), what
makes a run this run (`run_identity.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopos.config.differences import changes
from loopos.config.faults import UserError
from loopos.storage.durable import JSON
from loopos.training import checkpoint
from loopos.training.run_identity import Identity, as_lines, compare
from loopos.training.run_log import WrittenLog


@dataclass(frozen=True)
class Beginning:
    """Where a session begins: at a checkpoint, or at step 0 without one. `changed`: settings that differ from those of
    the checkpoint's session, before and now. `lines`: for the user.
    """

    found: checkpoint.Checkpoint | None
    written: WrittenLog
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        return None if self.found is None else self.found.step

    def sentence(self) -> str:
        """Where a resumed run begins."""
        if self.found is None:
            return "no checkpoint to resume from: starting at step 0"
        return f"resumed from the checkpoint of step {self.found.step}"

    def facts(self) -> dict[str, JSON]:
        """What the log says of it."""
        return {
            "resumed": self.found is not None,
            "changed": {key: list(values) for key, values in self.changed.items()},
        }


def beginning(run_dir: Path, config: Mapping[str, Any], identity: Identity, *, resume: bool) -> Beginning:
    """Where a run begins in its folder. config: the resolved one.

    Raises `UserError` for a checkpoint of a run that learns from other rows or means something else, key by key, and
    for a log that is broken or is not the checkpoint's.
    """
    if not resume:
        return Beginning(None, WrittenLog.none(run_dir))
    found, lines = checkpoint.newest_whole(run_dir / "checkpoints")
    if found is None:
        return Beginning(None, WrittenLog.none(run_dir), lines=tuple(lines))
    written = WrittenLog.read(run_dir, found.state["events_offset"], found.state.get("events_sha256"))
    changed = changes(written.settings or config, config)
    # Where the folder lies by now is no setting of the training.
    changed.pop("data.output_dir", None)
    compared = compare(found.state.get("identity", {}), identity, changed)
    if compared.refused:
        raise UserError(
            f"{run_dir}: --resume: this is another run than the one that was begun there:{as_lines(compared.refused)}\n"
            "resume it with what it began with, or choose another output_dir"
        )
    return Beginning(found, written, compared.changed, (*lines, *written.warnings, *compared.sentences()))
