"""The board in Chromium: its main path by mouse and by keys, hostile texts, a restart, contrast, screenshots.

Without Chromium or playwright the tests are skipped. `LOOPOS_CHROMIUM` names another program than /usr/bin/chromium.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from board_client import TOKEN, running
from run_files import RunWriter, finished_run, policy_run, write_answers

PROGRAM = os.environ.get("LOOPOS_CHROMIUM", "/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(PROGRAM).is_file(), reason=f"no Chromium at {PROGRAM}"),
]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
ASSETS = Path(__file__).parents[2] / "docs" / "assets"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        yield opened
        opened.close()


@contextmanager
def page_at(browser: Any, link: str, **options: Any) -> Iterator[Any]:
    """A page at the link. Fails for an error in the console, a dialog, a request elsewhere."""
    options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: problems.append(request.url) if not is_own(request.url) else None)
    page.set_default_timeout(20_000)
    page.goto(link)
    yield page
    context.close()
    assert not problems


def is_own(url: str) -> bool:
    return re.match(r"(http://127\.0\.0\.1:\d+/|blob:http://127\.0\.0\.1:\d+/|data:)", url) is not None


def drawn(page: Any, name: str) -> Any:
    """The chart of a metric, once it is drawn."""
    figure = page.locator(f'figure[data-metric="{name}"]')
    figure.scroll_into_view_if_needed()
    figure.locator("canvas").wait_for()
    return figure


@pytest.fixture
def project(root: Path) -> Path:
    """Three runs: two of supervised fine-tuning, one of PPO with answers."""
    finished_run(root / "sft" / "small")
    finished_run(root / "sft" / "large", training={"learning_rate": 3e-4})
    policy_run(root / "ppo")
    return root


@pytest.mark.smoke
def test_the_board_opens_and_shows_curves(project: Path, browser: Any) -> None:
    with running(project) as link, page_at(browser, link) as page:
        page.get_by_label("Show sft/small", exact=True).check()
        figure = drawn(page, "loss")
        assert "sft/small: last" in figure.locator(".chart").get_attribute("aria-label")
        assert TOKEN not in page.url
        assert TOKEN not in page.content()


def test_the_main_path_by_mouse(project: Path, browser: Any) -> None:
    with running(project) as link, page_at(browser, link) as page:
        for name in ("sft/small", "sft/large", "ppo"):
            page.get_by_label(f"Show {name}", exact=True).check()
        assert len(drawn(page, "loss").locator(".legend li").all()) == 4, "two runs, steps and validation"
        page.locator("#axis").select_option("tokens")
        page.locator("#window").select_option("20")
        page.locator("#log").check()
        page.reload()
        # A reload keeps what is shown.
        playwright.expect(page.locator("#axis")).to_have_value("tokens")
        playwright.expect(page.locator("#window")).to_have_value("20")
        assert page.get_by_label("Show ppo", exact=True).is_checked()
        figure = drawn(page, "loss")
        with page.expect_download() as saved:
            figure.get_by_role("button", name="Save as PNG: loss").click()
        assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
        with page.expect_download() as saved:
            figure.get_by_role("button", name="Save as SVG: loss").click()
        picture = Path(saved.value.path()).read_text()
        assert picture.startswith("<svg")
        assert picture.count("<polyline") == 6
        assert "sft/large" in picture
        figure.get_by_role("button", name="Show the numbers: loss").click()
        assert figure.locator("tbody tr").count() > 100
        assert page.locator(".frontier circle").count() == 40
        assert page.locator(".frontier path").count() == 3
        page.get_by_role("tab", name="Samples").click()
        assert page.locator(".answer").count() == 6
        page.get_by_label("reward from").fill("0.9")
        page.get_by_label("reward from").blur()
        page.get_by_text("1 to 1 of 1 prompts").wait_for()
        page.get_by_role("tab", name="Settings").click()
        page.get_by_role("rowheader", name="training.learning_rate").wait_for()
        page.get_by_role("button", name="sft/large", exact=True).click()
        page.get_by_text("best validation: loss 0.9 at step 100").wait_for()
        page.get_by_label("Note", exact=True).fill("a note")
        page.get_by_label("Tags").fill("good, kept")
        page.get_by_role("button", name="Save note and tags").click()
        page.locator("#runs .tag", has_text="kept").wait_for()
        with page.expect_download() as saved:
            page.get_by_role("link", name="step", exact=True).click()
        assert Path(saved.value.path()).read_text().startswith("step,time,loss")


def test_the_main_path_by_keys(project: Path, browser: Any) -> None:
    with running(project) as link, page_at(browser, link) as page:
        page.get_by_label("Show ppo", exact=True).wait_for()
        page.keyboard.press("/")
        page.keyboard.type("sft/small")
        page.get_by_text("1 of 3").wait_for()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") != "checkbox":
            page.keyboard.press("Tab")
        if not page.get_by_label("Show sft/small", exact=True).is_checked():
            page.keyboard.press("Space")
        assert page.get_by_label("Show sft/small", exact=True).is_checked()
        chart = drawn(page, "loss").locator(".chart")
        chart.focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        announced = page.locator("#announce").inner_text()
        assert re.search(r"step 1: sft/small 2\.493 at 1", announced), announced
        page.keyboard.press("+")
        page.keyboard.press("v")
        page.locator('[aria-label="Numbers of loss"]').wait_for()
        page.keyboard.press("0")
        page.keyboard.press("4")
        assert page.evaluate("document.activeElement.id") == "tab-run"
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.id") == "tab-settings"
        before = page.evaluate("document.documentElement.dataset.theme")
        page.keyboard.press("t")
        assert page.evaluate("document.documentElement.dataset.theme") != before
        page.keyboard.press("?")
        assert page.get_by_role("dialog").is_visible()
        page.keyboard.press("Escape")
        assert not page.get_by_role("dialog").is_visible()


def test_new_points_come_by_themselves_also_after_a_restart(root: Path, browser: Any) -> None:
    run = RunWriter(root / "live")
    run.session()
    run.steps(1, 10)
    with running(root) as link, page_at(browser, link) as page:
        chart = drawn(page, "learning_rate").locator(".chart")
        run.steps(11, 20)
        page.locator("#runs", has_text="20 / 100").wait_for()
        address = page.url
    with running(root) as again, page_at(browser, again) as page:
        page.goto(f"{again.partition('/?')[0]}/#{address.partition('#')[2]}")
        chart = drawn(page, "loss").locator(".chart")
        assert "by step" in chart.get_attribute("aria-label")
    run.close()


def payloads(number: int) -> list[str]:
    """Texts that run a script where they are read as HTML, in an attribute, a URL or a template."""
    calls = [f"window.top.hacked={n}" for n in range(number)]
    forms = [
        "<script>{}</script>", "<img src=x onerror='{}'>", "\"><svg onload='{}'>", "</textarea><img src=x onerror='{}'>",
        "<a href='javascript:{}' autofocus onfocus='{}'>x</a>", "<iframe srcdoc='<script>{}</script>'></iframe>",
        "<math><mtext><img src onerror={}></mtext></math>", "</title></style><script>{}</script>",
        "<details open ontoggle={}>", "<body onload={}>", "<object data='javascript:{}'>", "<input autofocus onfocus={}>",
        "[x](javascript:{})", "'-{}-'", "`${{{}}}`", "<style>@import 'javascript:{}'</style>", "<base href='//evil.example'>{}",
        "<form action=javascript:{}><button autofocus>", "<svg><animate onbegin={} attributeName=x dur=1s>", "<video><source onerror={}>",
    ]  # fmt: skip
    return [forms[n % len(forms)].replace("{}", calls[n]) for n in range(number)]


def test_hostile_texts_run_no_script(root: Path, browser: Any) -> None:
    """300 payloads as names of runs, metrics and tags, as notes, prompts, answers, alerts and settings."""
    texts = payloads(300)
    names = [re.sub(r"[/\0]", "_", text)[:120] for text in texts[:40]]
    for number, name in enumerate(names):
        run = RunWriter(
            root / name,
            {"computation": {"method": texts[60 + number]}, "data": {texts[100 + number]: texts[140 + number]}},
        )
        run.session(rows=[texts[180 + number]])
        for step in (1, 2):
            run.write("step", step, {texts[220 + number]: 1.0 + step, "loss": 1.0})
        run.write("alert", 2, {"name": "x", "message": texts[260 + number], "value": 1, "limit": 0})
        run.close()
        write_answers(run.folder, iter(texts[number : number + 6]))
        note = {"note": texts[number], "tags": [texts[300 - number - 1][:64]]}
        (root / f"{name}.board.json").write_text(json.dumps(note))
    with running(root) as link, page_at(browser, link) as page:
        page.locator("#runs tbody tr").nth(len(names) - 1).wait_for()
        boxes = page.locator("#runs tbody input")
        for number in range(8):
            boxes.nth(number).check()
        drawn(page, "loss")
        for key, selector in (("2", ".answer"), ("3", "#view-settings table"), ("4", "#view-run table")):
            page.keyboard.press(key)
            page.locator(selector).first.wait_for()
        for number in range(8, 14):
            page.locator("#runs tbody button.link").nth(number).click()
            page.locator("#view-run h2").first.wait_for()
        assert page.evaluate("window.hacked") is None
        assert (
            page.evaluate(
                "document.querySelectorAll('main script, main img, main iframe, main object, main form[action]').length"
            )
            == 0
        )


CONTRAST = """() => {
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      if (a > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!text || !element.offsetParent || element.disabled || element.closest(".hidden-text, .skip, svg")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)} ${element.textContent.slice(0, 30)}`);
  }
  return bad;
}"""
UNNAMED = """() => [...document.querySelectorAll("button, a, input, select, textarea, [role=application]")]
  .filter((each) => each.offsetParent && !(each.getAttribute("aria-label") || each.textContent.trim() || each.labels?.length))
  .map((each) => each.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize(
    ("name", "scheme", "size"),
    [
        ("board", "light", (1000, 700)),
        ("board_dark", "dark", (1000, 700)),
        ("board_phone", "light", (360, 740)),
        ("", "dark", (3840, 2160)),
    ],
)
def test_themes_and_widths(project: Path, browser: Any, name: str, scheme: str, size: tuple[int, int]) -> None:
    """Contrast of all texts, names of all controls, nothing wider than the window; the pictures of docs/board.md."""
    width, height = size
    with (
        running(project) as link,
        page_at(browser, link, viewport={"width": width, "height": height}, color_scheme=scheme) as page,
    ):
        for run in ("sft/small", "sft/large", "ppo"):
            page.get_by_label(f"Show {run}", exact=True).check()
        drawn(page, "loss")
        page.locator("#window").select_option("5")
        for tab in ("curves", "samples", "settings", "run"):
            page.locator(f"#tab-{tab}").click()
            page.wait_for_timeout(300)
            assert page.evaluate(CONTRAST) == []
            assert page.evaluate(UNNAMED) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#tab-curves").click()
        drawn(page, "kl")
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        if name:
            page.screenshot(path=ASSETS / f"{name}.png")
