"""`loopos study new|add|show|vote|export`: studies of human feedback, in folders, without torch."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopos.cli.answers import json_lines, refuse_unwritable, say, say_json, table, write_whole
from loopos.cli.options import Columns, Encoding, Json, Overrides, argument, parse_columns, path, refuse, text_rules
from loopos.cli.outcome import note
from loopos.config.diagnostics import UserError

if TYPE_CHECKING:
    from loopos.studies.events import Assignment
    from loopos.studies.quality import Proportion, Quality
    from loopos.studies.study import Study

StudyFolder = Annotated[Path, argument("FOLDER", "Folder of the study.", parser=path)]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings to start from: the study.json of another.", parser=path),
]
ItemFiles = Annotated[list[str], argument("FILE", "Files of comparisons, groups, answers or prompts.", parser=str)]
Names = Annotated[
    tuple[str, ...],
    typer.Option(
        "--source",
        metavar="NAME",
        help="Source of the responses of each file; of one file with pairs, of the first and second. Repeatable.",
    ),
]
Format = Annotated[str, typer.Option("--format", metavar="NAME", help="Such as preferences: see list study-formats.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="File of JSON Lines to write.", parser=path)
]
Validation = Annotated[
    float, typer.Option("--validation", help="Fraction of the items for FILE.validation.jsonl, by whole prompts.")
]
Annotator = Annotated[str, typer.Option("--annotator", metavar="NAME", help="Your name.", show_default=False)]
Between = Annotated[
    tuple[str, ...],
    typer.Option("--between", metavar="SOURCE", help="Test the win rate of two sources; give it twice."),
]
_KEYS = {
    "compare": {"1": "left", "2": "right", "t": "tie", "b": "both_bad"},
    "thumbs": {"u": "up", "d": "down"},
    "rating": {},
}


def new(folder: StudyFolder, overrides: Overrides = (), config: ConfigFile = None, json: Json = False) -> int:
    """Makes a study. Raises `ConfigError` for settings that do not fit."""
    from loopos.config.load import load_recipe
    from loopos.config.source import read_source
    from loopos.config.study import StudyConfig
    from loopos.studies.study import Study

    source = None if config is None else read_source(config)
    loaded = load_recipe(source, overrides, StudyConfig)
    assert isinstance(loaded.config, StudyConfig), "load_recipe makes the class that it is given"
    for sentence in loaded.notes:
        note(f"note: {sentence}")
    with Study.create(folder, loaded.config):
        pass
    if json:
        say_json({"study": str(folder), "config": loaded.config.model_dump()})
    else:
        say(f"{folder}: a new study; add items with `loopos study add {folder} FILE`")
    return 0


def add(
    folder: StudyFolder,
    files: ItemFiles,
    sources: Names = (),
    columns: Columns = (),
    encoding: Encoding = None,
    json: Json = False,
) -> int:
    """Adds the items of files. Raises `DataError` for what cannot be read."""
    from loopos.studies.imports import items_of

    with _opened(folder) as study:
        found = items_of(
            files,
            study.config.mode,
            columns=parse_columns(columns),
            names=sources,
            seed=study.config.seed,
            rules=text_rules(encoding),
        )
        added = study.add(found.items)
        progress = study.progress()
    if json:
        counts = {"added": added.added, "repeated": added.repeated, "dropped": dict(found.dropped)}
        say_json({"study": str(folder), **counts, "items": progress.items, "waiting": progress.waiting})
        return 0
    for sentence in found.notes:
        note(sentence)
    left_out = "".join(f", {count:,} left out ({reason})" for reason, count in found.dropped.items())
    repeated = f", {added.repeated:,} were there already" if added.repeated else ""
    say(f"{folder}: {added.added:,} items added{repeated}{left_out}; {progress.items:,} in all")
    if progress.waiting:
        say(f"{progress.waiting:,} items wait for responses: sample them with `loopos sample`, then add that file")
    return 0


def show(folder: StudyFolder, between: Between = (), json: Json = False) -> int:
    """Prints progress, quality and strengths. Raises `UserError` for a folder without a study."""
    from loopos.studies.quality import quality, ranking, win_rate

    refuse([] if len(between) in (0, 2) else [f"--between: got {len(between)} sources; expected two"])
    with _opened(folder) as study:
        progress, ranked = study.progress(), ranking(study)
        found = quality(study) if progress.votes else None
        test = win_rate(study, between[0], between[1]) if between else None
        title, mode = study.config.title, study.config.mode
    if json:
        figures = None if found is None else asdict(found)
        if figures is not None:
            figures["cohen"] = [{"annotators": pair, "kappa": value} for pair, value in figures["cohen"].items()]
        strengths = None if ranked is None else asdict(ranked)
        rate = None if test is None else {"a": between[0], "b": between[1], **asdict(test)}
        say_json({"study": str(folder), "title": title, "mode": mode, "progress": asdict(progress),
                  "quality": figures, "ranking": strengths, "win_rate": rate})  # fmt: skip
        return 0
    say(f"{folder}: {title} ({mode})")
    say(f"{progress.votes:,} of {progress.target:,} votes, {progress.items:,} items, {progress.waiting:,} without "
        f"responses; {progress.repeats:,} repeats, {progress.skips:,} skips, {progress.flagged:,} flagged")  # fmt: skip
    if found is not None:
        _print_quality(found)
    if ranked is not None and ranked.fit is not None:
        say("strengths of the sources (Bradley–Terry, Elo points)")
        rows = [(one.source, one.rating, one.low, one.high, one.games, one.wins, one.ties, ranked.elo[one.source])
                for one in ranked.fit.strengths]  # fmt: skip
        say(table(rows, head=("source", "rating", "95% from", "to", "votes", "wins", "ties", "Elo")))
    elif ranked is not None:
        say(f"no strengths of the sources: {ranked.problem}")
    if test is not None:
        shown = "no item has all its votes" if test.rate is None else f"{test.rate:.3f} of {test.trials:,} items"
        decision = f"decided after {test.decided_after}: {test.winner}" if test.decided_after else "continue"
        names = f"{between[0]} (a) against {between[1]} (b)"
        say(f"{names}: {shown}, between {test.low:.3f} and {test.high:.3f}; {decision}")
    return 0


def export(
    folder: StudyFolder, output: Output, format: Format = "preferences", validation: Validation = 0.0,
    json: Json = False,
) -> int:  # fmt: skip
    """Writes the votes as rows of training data. Raises `UserError` where no item gives a row."""
    from loopos.studies.exports import export as exported
    from loopos.studies.verdicts import judged_items

    refuse([] if 0 <= validation < 1 else [f"--validation: got {validation:g}; expected 0 or more, and less than 1"])
    files = [output, output.with_suffix(f".validation{output.suffix}")]
    for file in files:
        refuse_unwritable(file)
    with _opened(folder) as study:
        judged = judged_items(study.items, study.votes(), study.config.mode)
        if not judged:
            raise UserError(f"{folder}: got no votes; expected some: `loopos study vote {folder} --annotator NAME`")
        found = exported(judged, format, validation=validation, seed=study.config.seed)
    left_out = "".join(f", {count:,} left out ({reason})" for reason, count in found.dropped.items())
    if not found.train:
        raise UserError(f"--format: got {format}, in which no item gives a row{left_out}; expected another format")
    written = {str(file): len(rows) for file, rows in zip(files, (found.train, found.validation), strict=True) if rows}
    for file, rows in zip(files, (found.train, found.validation), strict=True):
        if rows:
            write_whole(file, json_lines(rows))
    if json:
        say_json({"study": str(folder), "format": format, "judged": len(judged), "written": written,
                  "dropped": dict(found.dropped)})  # fmt: skip
        return 0
    for name, count in written.items():
        say(f"{name}: {count:,} rows")
    say(f"{len(judged):,} judged items{left_out}")
    return 0


def vote(folder: StudyFolder, annotator: Annotator) -> int:
    """Shows one item after another and records what the annotator types. Raises `UserError`."""
    with _opened(folder) as study:
        if study.config.guidelines:
            say(study.config.guidelines)
        last = ""
        while (assigned := study.next_item(annotator)) is not None:
            _print_item(study, assigned)
            began = time.monotonic()
            typed = _typed(study)
            if typed in ("q", ""):
                return 0
            if typed == "undo":
                if last:
                    study.undo(last, annotator=annotator, key=uuid.uuid4().hex)
                    last = ""
                else:
                    say("nothing to take back")
                continue
            last = _recorded(study, assigned, annotator, typed, time.monotonic() - began) or last
        progress = study.progress()
        say(f"nothing left for {annotator}: {progress.votes:,} of {progress.target:,} votes")
    return 0


def _recorded(study: Study, assigned: Assignment, annotator: str, typed: str, seconds: float) -> str:
    """The key of what was recorded; empty where the input does not fit, which is reported."""
    key = uuid.uuid4().hex
    try:
        if typed == "s":
            study.skip(assigned.key, annotator=annotator, key=key)
        elif typed.startswith("f "):
            study.flag(assigned.item, typed[2:], annotator=annotator, key=key)
        else:
            ballot = {**_ballot(study, typed), "seconds": round(seconds, 2)}
            study.vote(assigned.key, ballot, annotator=annotator, key=key)
    except UserError as problem:
        note(str(problem))
        return ""
    return key


def _ballot(study: Study, typed: str) -> dict[str, Any]:
    """What the annotator typed as a ballot: `1`, `1 3` with strength 3, `t`, `4` as a rating."""
    first, _, rest = typed.partition(" ")
    if study.config.mode == "rating":
        try:
            return {"rating": float(first)}
        except ValueError:
            raise UserError(f"got {first}; expected a number") from None
    choice = _KEYS[study.config.mode].get(first)
    if choice is None or (rest and not rest.isdigit()):
        raise UserError(f"got {typed}; expected one of {', '.join(_KEYS[study.config.mode])}")
    return {"choice": choice, **({"strength": int(rest)} if rest else {})}


def _print_item(study: Study, assigned: Assignment) -> None:
    from loopos.studies.items import text_of

    item = study.items[assigned.item]
    prompt = item.prompt
    texts = [prompt] if isinstance(prompt, str) else [f"{each['role']}: {each['content']}" for each in prompt]
    say("\n".join(["", "=" * 72, *texts]))
    sides = (assigned.left, 1 - assigned.left) if study.config.mode == "compare" else (0,)
    for number, index in enumerate(sides, start=1):
        say(f"{'-' * 30} {number}\n{text_of(item.responses[index].content)}")


def _typed(study: Study) -> str:
    """What the annotator types; empty at the end of the input."""
    least, most = study.config.rating_scale
    offered = {
        "compare": "1, 2 (with a strength: 1 3), t tie, b both bad",
        "thumbs": "u up, d down",
        "rating": f"a number from {least} to {most}",
    }[study.config.mode]
    try:
        found: str = typer.prompt(f"{offered}; s skip, f REASON flag, undo, q quit", default="q", show_default=False)
    except typer.Abort:
        return ""
    return found.strip()


def _print_quality(found: Quality) -> None:
    shown: Callable[[Proportion | None], tuple[Any, ...]] = lambda one: (  # noqa: E731
        ("", None, None, None) if one is None else (f"{one.count:,} of {one.total:,}", one.rate, one.low, one.high)
    )
    figures = {
        "same answer to a repeat": found.consistency,
        "left of those with a winner": found.left,
        "the longer response": found.longer,
        "the higher reward": found.reward,
    }
    rows = [(name, *shown(one)) for name, one in figures.items() if one is not None]
    if rows:
        say("votes")
        say(table(rows, head=("", "count", "rate", "95% from", "to")))
    agreement = [("Krippendorff's alpha", found.alpha, *(found.alpha_interval or (None, None)))]
    agreement += [("Fleiss' kappa", found.fleiss, None, None)]
    agreement += [
        (f"Cohen's kappa of {one} and {other}", value, None, None) for (one, other), value in found.cohen.items()
    ]
    if any(row[1] is not None for row in agreement):
        say(f"agreement of annotators ({found.level})")
        say(table([row for row in agreement if row[1] is not None], head=("", "value", "95% from", "to")))
    say("annotators")
    people = [
        (one.annotator, one.votes, *(None if each is None else each.rate for each in
         (one.consistency, one.left, one.longer)), one.seconds, one.pace)
        for one in found.annotators
    ]  # fmt: skip
    say(table(people, head=("name", "votes", "repeats agree", "left", "longer", "seconds", "pace")))


@contextmanager
def _opened(folder: Path) -> Iterator[Study]:
    """The study in a folder; closes it. Raises `UserError`."""
    from loopos.studies.study import Study

    with Study.open(folder) as study:
        if study.progress().torn_bytes:
            note(f"{folder}: removed a line that a killed process had not finished; it was not acknowledged")
        yield study
