"""Checks of rows before torch and transformers are imported, so that a mistake shows at once.

`check_columns` finds the columns from the first rows; in JSON, where columns differ by row, it looks for a problem of
the first rows in all of them. `check_rows` reads what training would read: unreadable rows, labels of no class, chats
without an answer, identical pairs. Good rows are handed to training through `read_ahead`. Hub ids and data sets saved
by `datasets` are left to training, because opening them takes too long; so are rows over the maximum length, because
the tokenizer comes with transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.differences import resumed_config
from loopos.config.methods import method_row
from loopos.config.paths import MODEL_DESCRIPTION
from loopos.config.sections import MethodConfig
from loopos.data import formats, preference_formats, supervised_rows
from loopos.data.annotation_exports import flat_rows
from loopos.data.decoding import PLAIN_RULES, TextRules
from loopos.data.read_ahead import read_for_reuse
from loopos.data.reading import SourceKeys, opened, validation_source
from loopos.data.rows import Row, RowReader, read
from loopos.storage.hub import require_hub

Detect: TypeAlias = Callable[[Sequence[str], str], object]
"""Finds a format from columns and the name of their source, or raises `DataError`."""

_SAMPLE = 50
# What pretraining reads whole, without columns.
_RUNNING_TEXT = (".txt", ".md", ".text")
# Formats in which every row has the columns of the first.
_WITH_HEADER = frozenset({"csv", "tsv", "parquet", "arrow"})


def check_columns(config: MethodConfig) -> None:
    """Raises `DataError` where a source that the config names lacks a column that the method reads."""
    diagnostics: list[Diagnostic] = []
    for source, reader, detect in sources_of(config):
        diagnostics += [
            diagnostic for diagnostic in _diagnostics(source, reader, detect) if diagnostic not in diagnostics
        ]
    if diagnostics:
        raise DataError(diagnostics)


def check_labeled(
    source: str,
    columns: Mapping[str, str],
    *,
    require_label: bool,
    remembered: Mapping[str, str | None] | None = None,
    rules: TextRules = PLAIN_RULES,
) -> None:
    """Raises `DataError` where a source lacks the columns of labeled rows; without `require_label`, of texts.
    remembered: role → column as the model was trained.
    """
    _check_one(source, _labeled(columns, require_label=require_label, remembered=remembered), rules)


def check_responses(source: str, columns: Mapping[str, str], rules: TextRules = PLAIN_RULES) -> None:
    """Raises `DataError` where a source lacks the columns of responses that can be scored."""
    from loopos.data import responses_to_score  # 50 ms that only one command pays

    _check_one(source, lambda names, source: responses_to_score.detect(names, columns, source), rules)


def check_supervised(
    source: str,
    columns: Mapping[str, str],
    *,
    remembered: Mapping[str, str | None] | None = None,
    rules: TextRules = PLAIN_RULES,
) -> None:
    """Raises `DataError` where a source lacks the columns of rows for language models."""
    _check_one(source, _supervised(columns, remembered), rules)


def check_comparisons(source: str, columns: Mapping[str, str], rules: TextRules = PLAIN_RULES) -> None:
    """Raises `DataError` where a source lacks the columns of comparisons."""
    _check_one(source, _preferences(columns), rules)


def holds_comparisons(source: str, columns: Mapping[str, str], rules: TextRules = PLAIN_RULES) -> bool:
    """Whether the first rows of a source are comparisons; False for rows that cannot be read, which the check of what
    they are taken for reports.
    """
    try:
        reader = read(source, rules=rules)
        if reader.location.kind != "files":
            return False
        with closing(_rows(reader)) as rows:
            sample = list(itertools.islice(rows, _SAMPLE))
    except DataError:
        return False
    return bool(sample) and _problem(sample, _preferences(columns)) is None


def _check_one(source: str, detect: Detect, rules: TextRules) -> None:
    diagnostics = _diagnostics(source, lambda: read(source, rules=rules), detect)
    if diagnostics:
        raise DataError(diagnostics)


def _labeled(
    columns: Mapping[str, str], *, require_label: bool, remembered: Mapping[str, str | None] | None = None
) -> Detect:
    return lambda names, source: formats.detect(
        names, columns, require_label=require_label, remembered=remembered, source=source
    )


def _preferences(columns: Mapping[str, str], *, prompts: bool = False) -> Detect:
    return lambda names, source: preference_formats.detect(names, columns, source=source, prompts=prompts)


def _judgments(columns: Mapping[str, str]) -> Detect:
    from loopos.data import stepwise  # only reward models pay for its import

    return lambda names, source: stepwise.detect(names, columns, source)


def _thumbs(columns: Mapping[str, str]) -> Detect:
    from loopos.data import thumbs  # only one method pays for its import

    return lambda names, source: thumbs.detect(names, columns, source)


def _supervised(columns: Mapping[str, str], remembered: Mapping[str, str | None] | None = None) -> Detect:
    return lambda names, source: supervised_rows.detect(names, columns, remembered=remembered, source=source)


def sources_of(config: Any) -> Iterator[tuple[str, Callable[[], RowReader], Detect]]:
    """Each source of rows, how it is opened, and how its format is found.

    By the kind of rows that the method reads: importing the configs of all methods to tell them by class takes longer
    than the check. The columns of a method that names no kind are left to it.
    """
    if len(config.phases) > 1:
        for phase in config.phases:
            yield from sources_of(phase)
        return
    data = config.data
    columns: dict[str, str] = {**getattr(data, "columns", {})}
    for kind in method_row(config.computation.method).reads:
        match kind:
            case "labeled":
                yield from _both(data, data.training_data, _labeled(columns, require_label=True))
            case "text":
                if not data.source.lower().removesuffix(".gz").removesuffix(".zst").endswith(_RUNNING_TEXT):
                    yield from _both(data, data.source, _labeled(columns, require_label=False))
            case "demonstrations":
                yield from _both(data, data.source, _supervised(columns))
            case "comparisons":
                prompts = getattr(data, "prompts", None)
                if prompts is None:
                    yield from _both(data, data.source, _preferences(columns))
                    continue
                yield prompts, partial(opened, data, prompts, data.training_split), _preferences(columns, prompts=True)
                if (own := data.validation_data) is not None:
                    yield own, partial(opened, data, own, data.training_split), _preferences(columns)
            case "judgments":
                yield from _both(data, data.source, _judgments(columns))
            case "thumbs":
                yield from _both(data, data.source, _thumbs(columns))
            case "prompts":
                # An environment names the columns that it needs.
                detect = _any_columns if _is_played(config) else _preferences(columns, prompts=True)
                yield from _both(data, data.source, detect)


def _is_played(config: Any) -> bool:
    """Whether an environment plays the rows."""
    return getattr(config, "environment", None) is not None


def _any_columns(names: Sequence[str], source: str) -> None:
    """Finds no format."""


def _both(data: SourceKeys, source: str, detect: Detect) -> Iterator[tuple[str, Callable[[], RowReader], Detect]]:
    """The source of the training rows, and that of the validation rows if it is another one."""
    yield source, partial(opened, data, source, data.training_split), detect
    own = validation_source(data, source)
    if own is not None:
        yield own[0], partial(opened, data, *own), detect


def _diagnostics(source: str, open_reader: Callable[[], RowReader], detect: Detect) -> list[Diagnostic]:
    try:
        reader = open_reader()
        if reader.location.kind == "hub":
            require_hub("data.training_data", source, kind="dataset")
        if reader.location.kind != "files":
            return []
        with closing(_rows(reader)) as rows:
            sample = list(itertools.islice(rows, _SAMPLE))
        problem = _problem(sample, detect)
        if problem is None:
            return []
        if len(reader.location.files) > 1 or reader.location.files[0][1] not in _WITH_HEADER:
            problem = _problem(list(_rows(reader)), detect)
        return list(problem.diagnostics) if problem is not None else []
    except DataError as unreadable:
        return list(unreadable.diagnostics)


def _rows(reader: RowReader) -> Generator[Row]:
    yield from reader.rows()


def _problem(rows: Sequence[Row], detect: Detect) -> DataError | None:
    """Why no format is found; None where one is, or where there are no rows to tell."""
    if not rows:
        return None
    try:
        detect(list(dict.fromkeys(name for row in flat_rows(rows) for name in row.values)), rows[0].source)
    except DataError as problem:
        return problem
    return None


def check_rows(config: MethodConfig) -> None:
    """Reads all files of rows that the config names. Raises `DataError` for their faults, `ConfigError` for keys that
    contradict the labels.
    """
    for phase in _phases(config):
        if all(open_reader().location.kind == "files" for _, open_reader, _ in sources_of(phase)):
            # As the methods do, so that they are handed what they ask for.
            _check_phase(resumed_config(phase, Path(phase.data.output_dir)))


def _phases(config: MethodConfig) -> list[Any]:
    """The configs of the trainings that are to come: without the earlier phases whose model is there."""
    *earlier, last = config.phases
    return [*(phase for phase in earlier if not _has_model(phase)), last]


def _has_model(phase: Any) -> bool:
    return (Path(phase.data.output_dir) / "model" / MODEL_DESCRIPTION).is_file()


def _check_phase(config: Any) -> None:
    """By the kind of rows that the method reads, with the imports of one kind only: they take longer than small files.
    The rows of a method that names no kind are left to it.
    """
    data, seed = config.data, config.training.seed
    for kind in method_row(config.computation.method).reads:
        match kind:
            case "labeled":
                from loopos.data.labeled import check_for_task, load_labeled

                check_for_task(config, read_for_reuse(load_labeled, data, config.model, seed=seed).space)
            case "text":
                from loopos.data.corpus import load_corpus

                for source in (data.source, data.validation_data):
                    if source is not None:
                        read_for_reuse(load_corpus, data, source)
            case "demonstrations":
                from loopos.data.supervised import load_supervised

                read_for_reuse(load_supervised, data, seed=seed)
            case "comparisons":
                from loopos.data.preference_data import load_comparisons, load_prompts_to_compare

                prompts = getattr(data, "prompts", None)
                load = load_comparisons if prompts is None else load_prompts_to_compare
                read_for_reuse(load, data, data.source, seed=seed)
            case "judgments":
                from loopos.data.preference_data import load_judgments

                read_for_reuse(load_judgments, data, data.source, seed=seed)
            case "thumbs":
                from loopos.data.preference_data import load_thumbs

                read_for_reuse(load_thumbs, data, data.source, seed=seed)
            case "prompts":
                from loopos.data.preference_data import load_prompts, load_tasks

                read_for_reuse(load_tasks if _is_played(config) else load_prompts, data, data.source, seed=seed)
