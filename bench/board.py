"""The board beside a live run: 12 runs, one of a million steps, watched by one page in Chromium.

    python bench/board.py [--steps 1000000] [--seconds 30]

Prints one JSON line: seconds until the list and the curves of the long run are drawn, on the first start and with its
cache; the delay of a new point from the run's log to the stream and to the page (median, 95%); memory of server and
page; and the cores that the server uses while a run logs ten steps a second. Needs the extras ui and dev, and Chromium.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

from loopos.storage.events import EventLog

PROGRAM = os.environ.get("LOOPOS_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
CONFIG = {"computation": {"mode": "posttraining", "method": "sft"}, "training": {"learning_rate": 1e-4}}


def write_step(log: EventLog, step: int) -> None:
    noise = math.sin(step * 12.9898) * 0.05
    metrics = {"loss": 2 * math.exp(-step / 3e5) + noise, "gradient_norm": 1 + noise, "learning_rate": 1e-4}
    metrics |= {"epoch": 0, "rows": 8 * step, "tokens": 1000 * step, "skipped": 0}
    log.write(
        "step", step=step, metrics=metrics, timing={"seconds": 0.1, "tokens_per_second": 1e4, "time": time.time()}
    )


def make_run(folder: Path, steps: int) -> EventLog:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    log = EventLog(folder / "events.jsonl")
    session = {"total_steps": max(steps, 1), "resumed": False, "settings": CONFIG}
    log.write("session", step=0, metrics=session, timing={"time": time.time()})
    for step in range(1, steps + 1):
        write_step(log, step)
    return log


@contextmanager
def board(folder: Path, cache: Path) -> Iterator[tuple[str, psutil.Process]]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "XDG_STATE_HOME": str(cache)}
    command = [sys.executable, "-m", "loopos", "ui", str(folder), "--no-open"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = re.search(r"http://\S+", process.stdout.readline())
        assert link is not None
        try:
            yield link[0], psutil.Process(process.pid)
        finally:
            process.terminate()


def first_paint(browser: Any, link: str) -> dict[str, float]:
    """Seconds from the opening of the link until the list, and until the loss of the long run, are drawn."""
    page = browser.new_page()
    began = time.perf_counter()
    page.goto(link)
    page.get_by_label("Show long", exact=True).wait_for()
    listed = time.perf_counter() - began
    page.get_by_label("Show long", exact=True).check()
    page.locator('figure[data-metric="loss"] canvas').wait_for(timeout=60_000)
    drawn = time.perf_counter() - began
    page.close()
    return {"list_seconds": round(listed, 2), "curve_seconds": round(drawn, 2)}


WATCH = """() => {
  window.seen = {};
  const cell = [...document.querySelectorAll("#runs tr")].find((row) => row.textContent.includes("live")).querySelector("progress").nextElementSibling;
  const note = () => { const step = parseInt(cell.textContent.replace(/,/g, "")); window.seen[step] ??= Date.now() / 1000; };
  new MutationObserver(note).observe(cell, {childList: true, characterData: true, subtree: true});
}"""


def delays(page: Any, log: EventLog, seconds: float) -> list[float]:
    """Seconds from the writing of a step until the page's list shows it or a later one; ten steps a second."""
    page.evaluate(WATCH)
    written = {}
    for step in range(1, int(10 * seconds) + 1):
        write_step(log, step)
        written[step] = time.time()
        time.sleep(0.1)
    time.sleep(2)
    seen = sorted((int(step), at) for step, at in page.evaluate("window.seen").items())
    return [
        next(at for shown, at in seen if shown >= step) - wrote
        for step, wrote in written.items()
        if seen[-1][0] >= step
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder, cache = Path(temporary) / "outputs", Path(temporary) / "cache"
        make_run(folder / "long", options.steps).close()
        for number in range(10):
            make_run(folder / f"short{number}", 1000).close()
        live = make_run(folder / "live", 0)
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        found: dict[str, Any] = {"steps": options.steps}
        with board(folder, cache) as (link, server):
            found["first_start"] = first_paint(browser, link)
            began = time.perf_counter()
            while not list(cache.glob("loopos/board/*.npz")):
                time.sleep(0.2)
            found["read_seconds"] = round(time.perf_counter() - began + found["first_start"]["curve_seconds"], 1)
        with board(folder, cache) as (link, server):
            found["with_cache"] = first_paint(browser, link)
            page = browser.new_page()
            page.goto(link)
            for name in ["long", "live", *(f"short{number}" for number in range(8))]:
                page.get_by_label(f"Show {name}", exact=True).check()
            page.wait_for_timeout(3000)
            used = sum(server.cpu_times()[:2])
            began = time.perf_counter()
            late = sorted(delays(page, live, options.seconds))
            spent = time.perf_counter() - began
            found["delay_median"] = round(statistics.median(late), 2)
            found["delay_95"] = round(late[int(0.95 * len(late))], 2)
            found["server_cores"] = round((sum(server.cpu_times()[:2]) - used) / spent, 3)
            found["server_mib"] = round(server.memory_info().rss / 2**20)
            heap = page.evaluate("performance.memory ? performance.memory.usedJSHeapSize : 0")
            found["page_mib"] = round(heap / 2**20, 1)
        browser.close()
        live.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
