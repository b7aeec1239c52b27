"""The board: the runs of a folder, live, with their curves, samples, settings and notes.

Routes below `/api/board`. Reads: `runs`, `stream` (server-sent events of changed snapshots), `run/ID`, `run/ID/curves`,
`run/ID/samples`, `run/ID/csv`, `settings`. Writes: `run/ID/note`, `run/ID/stop`, `run/ID/resume`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from loopos.config.differences import differences
from loopos.serving.errors import ApiError
from loopos.web import curves
from loopos.web.board_runs import ANSWER_FILES, MOST_NOTE, MOST_TAG, MOST_TAGS, Board, BoardRun, folder_of
from loopos.web.board_samples import Filter, SampleFiles, side_by_side
from loopos.web.event_index import KINDS
from loopos.web.page import Context, Page, answer, number_of, text_of, whole_of, write
from loopos.web.run_process import Started, stop
from loopos.web.security import inside

_BODY = 1 << 17
_MOST_CURVES, _MOST_RUNS, _MOST_POINTS = 200, 24, 20_000
# Seconds between two looks for changed snapshots, and between two signs that the stream is open.
_STREAM_LOOK, _STREAM_SIGN = 0.25, 15.0
_USER_IN_URL = re.compile(r"(://)[^/@\s]*@")
_SECRET_KEY = re.compile(r"(^|_)(api_key|secret|password|access_token|auth_token)$")
_HIDDEN = "(hidden)"


def page(context: Context) -> Page:
    """The page of runs."""
    routes = _Routes(Board(context), context)
    return Page(name="board", title="Board", routes=routes.listed(), background=routes.board.follow)


class _Routes:
    def __init__(self, board: Board, context: Context) -> None:
        self.board, self._context = board, context
        self._samples, self._started = SampleFiles(), Started()

    def listed(self) -> list[Route]:
        run = "/api/board/run/{key:str}"
        return [
            Route("/api/board/runs", self.runs),
            Route("/api/board/stream", self.stream),
            Route("/api/board/settings", self.settings),
            Route(run, self.run),
            Route(f"{run}/curves", self.reduced_curves),
            Route(f"{run}/samples", self.samples),
            Route(f"{run}/csv", self.csv),
            write(f"{run}/note", self.note, _BODY),
            write(f"{run}/stop", self.stop, _BODY),
            write(f"{run}/resume", self.resume, _BODY),
        ]

    def runs(self, _: Request) -> Response:
        """The snapshots of all runs."""
        return answer({"runs": [run.snapshot for run in list(self.board.runs.values()) if run.snapshot]})

    async def stream(self, _: Request) -> Response:
        """Server-sent events: first all snapshots, then those that changed, and the ids of runs that are gone."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._changes(), media_type="text/event-stream", headers=headers)

    async def _changes(self) -> AsyncIterator[str]:
        sent: dict[str, dict[str, Any]] = {}
        version, since = -1, 0.0
        loop = asyncio.get_running_loop()
        while not self._context.closing.is_set():
            if version != self.board.version or not sent:
                version = self.board.version
                now = {key: run.snapshot for key, run in list(self.board.runs.items()) if run.snapshot}
                changed = [snapshot for key, snapshot in now.items() if sent.get(key) is not snapshot]
                gone = [key for key in sent if key not in now]
                if changed or gone or not since:
                    body = answer({"runs": changed, "gone": gone}).body
                    yield f"data: {bytes(body).decode()}\n\n"
                    since = loop.time()
                sent = now
            if loop.time() - since > _STREAM_SIGN:
                yield ": open\n\n"
                since = loop.time()
            await asyncio.sleep(_STREAM_LOOK)

    def run(self, request: Request) -> Response:
        """One run in full: metrics, markers, sessions, alerts, reward over KL, how it ended."""
        run = self._of(request)
        described, index = folder_of(run, self.board.root), run.shown
        axis = self._axis(request)
        sessions = [
            {"step": event["step"], "time": event["timing"].get("time")}
            | {key: event["metrics"].get(key) for key in ("resumed", "rows", "versions", "machine", "precision")}
            for event in index.notable
            if event["event"] == "session"
        ]
        return answer(
            {
                **run.snapshot,
                "folder": str(run.folder),
                "names": curves.names(index),
                "markers": curves.markers(index, axis),
                "frontier": curves.frontier(index),
                "sessions": sessions,
                "changed": described.setting_changes(),
                "verdict": described.outcome.verdict(),
                "exported": described.outcome.export_sentence(),
                "process": self._started.state(run.id, run.folder, self.board.root),
            }
        )

    def reduced_curves(self, request: Request) -> Response:
        """Curves of a run by `name` (`kind/metric`, several times), reduced to `points`; of `axis`, `low` to `high`."""
        run = self._of(request)
        view = curves.View(
            axis=self._axis(request),
            window=whole_of(request, "window", 1, low=1, high=100_000),
            points=whole_of(request, "points", 1000, low=4, high=_MOST_POINTS),
            low=number_of(request, "low"),
            high=number_of(request, "high"),
        )
        names = request.query_params.getlist("name")
        if len(names) > _MOST_CURVES:
            raise ApiError(400, f"name: got {len(names)}; expected at most {_MOST_CURVES}", param="name")
        found = {}
        for name in names:
            kind, _, metric = name.partition("/")
            if kind in KINDS and metric in run.shown.tables[kind].names:
                found[name] = curves.curve(run.shown, kind, metric, view)
        return answer({"id": run.id, "version": run.shown.version, "curves": found})

    def samples(self, request: Request) -> Response:
        """Answers of a run side by side: of the `file`, at `steps`, with rewards from `low` to `high`."""
        run = self._of(request)
        name = ANSWER_FILES.get(request.query_params.get("file", "samples"))
        if name is None:
            raise ApiError(400, f"file: expected one of {', '.join(ANSWER_FILES)}", param="file")
        file = run.folder / name
        records = self._samples.read(file) if inside(self.board.root, file) else []
        steps = [int(step) for step in request.query_params.getlist("step") if re.fullmatch(r"\d{1,12}", step)]
        chosen = Filter(
            steps=steps,
            low=number_of(request, "low"),
            high=number_of(request, "high"),
            text=request.query_params.get("text", "")[:1000],
            offset=whole_of(request, "offset", 0, low=0, high=10**9),
            limit=whole_of(request, "limit", 50, low=1, high=200),
        )
        return answer(side_by_side(records, chosen))

    def csv(self, request: Request) -> Response:
        """All numbers of the events of a `kind`, as a file."""
        run, kind = self._of(request), request.query_params.get("kind", "step")
        if kind not in KINDS:
            raise ApiError(400, f"kind: expected one of {', '.join(KINDS)}", param="kind")
        if run.index.offset < run.size and run.shown is not run.index:
            raise ApiError(409, "the log is still being read; try again in some seconds")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{run.name}-{kind}.csv")
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(curves.csv_lines(run.index, kind), media_type="text/csv", headers=headers)

    def settings(self, request: Request) -> Response:
        """The settings that differ between the runs `run`; of one run all that it has."""
        keys = request.query_params.getlist("run")
        if not 1 <= len(keys) <= _MOST_RUNS:
            raise ApiError(400, f"run: expected 1 to {_MOST_RUNS} runs", param="run")
        runs = [self._run(key) for key in keys]
        configs = [folder_of(run, self.board.root).config for run in runs]
        others = configs[1:] or [{}]
        found = dict.fromkeys(key for other in others for key in differences(configs[0], other))
        values = {key: [_shown(key, _value(config, key)) for config in configs] for key in found}
        return answer({"runs": keys, "settings": values})

    def note(self, request: Request, content: dict[str, Any]) -> Response:
        """Stores note and tags."""
        run = self._of(request)
        tags = content.get("tags", [])
        if not isinstance(tags, list) or len(tags) > MOST_TAGS:
            raise ApiError(400, f"tags: expected a list of at most {MOST_TAGS} texts", param="tags")
        texts = [text_of({"tags": tag}, "tags", most=MOST_TAG).strip() for tag in tags]
        self.board.write_note(run, text_of(content, "note", most=MOST_NOTE), [*dict.fromkeys(filter(None, texts))])
        return answer(run.snapshot)

    def stop(self, request: Request, _: dict[str, Any]) -> Response:
        """Asks the run's process to stop after its step, with a checkpoint."""
        return answer({"pid": stop(self._of(request).folder)})

    def resume(self, request: Request, _: dict[str, Any]) -> Response:
        """Starts a process that resumes the run."""
        run = self._of(request)
        return answer({"pid": self._started.resume(run.id, folder_of(run, self.board.root), self.board.root)})

    def _of(self, request: Request) -> BoardRun:
        return self._run(request.path_params["key"])

    def _run(self, key: str) -> BoardRun:
        try:
            return self.board.of(key)
        except KeyError:
            raise ApiError(404, "no such run", code="no_run") from None

    def _axis(self, request: Request) -> curves.Axis:
        named = request.query_params.get("axis", "step")
        for axis in curves.AXES:
            if axis == named:
                return axis
        raise ApiError(400, f"axis: expected one of {', '.join(curves.AXES)}", param="axis")


def _value(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _shown(key: str, value: Any) -> Any:
    """A setting without what is secret in it: keys of services, and users in addresses."""
    if value is not None and _SECRET_KEY.search(key.rpartition(".")[2]):
        return _HIDDEN
    text = json.dumps(value)
    hidden = _USER_IN_URL.sub(rf"\1{_HIDDEN}@", text)
    return value if hidden == text else json.loads(hidden)
