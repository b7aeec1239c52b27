"""`loopos ui`: the local app over a folder of runs, until a signal."""

from __future__ import annotations

import html
import importlib.util
import os
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from loopos.cli.answers import say
from loopos.cli.options import path, refuse
from loopos.cli.outcome import note
from loopos.config.diagnostics import MissingRequirement, UserError

_PACKAGES = ("starlette", "uvicorn")
RunsFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of runs.", parser=path)]


@dataclass(frozen=True, slots=True, kw_only=True)
class UiOptions:
    """The options of `loopos ui`."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; a public one requires a token."})
    port: int = field(default=0, metadata={"help": "Port to listen on; 0: any free port."})
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="LOOPOS_UI_TOKEN",
            help="Token of the link; better set in the environment.",
            show_default="made at the first start",
        ),
    ] = None
    open: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open", help="Open the link in the browser.", show_default="on a terminal with a display"
        ),
    ] = None


def run(folder: RunsFolder = Path("outputs"), *, options: UiOptions) -> int:
    """Serves the app until a signal. Raises `UserError` for a missing folder and options that are not safe."""
    from loopos.config.extras import install_command

    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingRequirement(f"loopos ui needs {' and '.join(missing)}; run\n  {install_command('ui')}")
    from loopos.serving.server import address_of, listening
    from loopos.web.event_index import cache_folder
    from loopos.web.security import state_folder, stored_token, token_problems
    from loopos.web.server import LIMITS
    from loopos.web.server import run as serve

    port = [] if 0 <= options.port <= 65535 else [f"--port: got {options.port}; expected 0 (any free one) to 65535"]
    refuse([*port, *token_problems(options.token, options.host)])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder with runs in it, such as outputs")
    token = options.token or stored_token(state_folder())
    with listening(options.host, options.port, LIMITS) as bound:
        link = f"{address_of(bound)}/?token={token}"

        def began(_: Callable[[], None]) -> None:
            # On standard output, as the answer of the command; a log of standard error does not get the token.
            say(f"{folder}: {link}")
            note("Ctrl-C ends")
            if _has_display() if options.open is None else options.open:
                _open(link, state_folder())

        serve(folder, bound, token=token, host=options.host, cache=cache_folder(), began=began)
    note("stopped")
    return 0


def _has_display() -> bool:
    """Whether a person is likely to see a browser of this machine."""
    has_one = sys.platform == "darwin" or any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return has_one and sys.stdout.isatty()


def _open(link: str, folder: Path) -> None:
    """Opens the link in the browser, by a file that only this user can read: arguments of programs are public."""
    file = folder / "open.html"
    text = f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(link)}">\n'
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as opened:
        os.fchmod(opened.fileno(), 0o600)
        opened.write(text)
    webbrowser.open(file.as_uri())
