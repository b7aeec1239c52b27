"""Draws the README's pictures from a real run: `terminal.svg` and `report.png`.

    python docs/assets/draw.py      # two to four minutes on 2 cores

It trains SmolLM2-135M on the packaged customer messages in a temporary folder, records what the commands print, and
takes the pages of the run's report.html. Needs the extra `demo`, and for the report `weasyprint` and `pypdfium2`
(`pip install weasyprint pypdfium2`).
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ASSETS = Path(__file__).parent
DATA = ASSETS.parents[1] / "src" / "loopos" / "demo"
WIDTH = 112
MOST_PAGES = 4
CONFIG = {
    "computation": {"mode": "posttraining", "method": "fine_tuning"},
    "training": {
        "learning_rate": 1e-4,
        "head_learning_rate": 1e-3,
        "batch_size": 16,
        "num_epochs": 3,
        "schedule": "linear",
        "warmup": 0.1,
        "validate_every": 10,
    },
    "data": {
        "pretrained_weights": "smollm2-135m",
        "training_data": "messages.jsonl",
        "validation_data": "held_out.jsonl",
        "output_dir": "outputs/my_run",
    },
}
COMMANDS = (
    "loopos validate run.json training.learning_rat=1e-4",
    "loopos train run.json",
    "loopos predict outputs/my_run questions.txt",
)


def recorded(folder: Path) -> list[tuple[str, str]]:
    """Each command with everything that it prints."""
    (folder / "run.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    (folder / "messages.jsonl").write_bytes((DATA / "intents_train.jsonl").read_bytes())
    (folder / "held_out.jsonl").write_bytes((DATA / "intents_validation.jsonl").read_bytes())
    (folder / "questions.txt").write_text("where is my parcel\nyou charged my card twice\n", encoding="utf-8")
    environment = {**os.environ, "COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    found = []
    for command in COMMANDS:
        program = [sys.executable, "-m", *command.split()]
        ended = subprocess.run(
            program, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        found.append((command, ended.stdout))
    return found


def draw_terminal(session: list[tuple[str, str]]) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for command, output in session:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        # On a terminal a bar replaces the lines of progress.
        for line in (each for each in output.rstrip().splitlines() if not each.startswith("step ")):
            shown = line if len(line) <= WIDTH else line[: WIDTH - 2] + " …"
            console.print(Text(shown, "bold" if "best validation" in line else ""), no_wrap=True)
        console.print()
    # Fonts are the reader's own: rich's would come from the network.
    picture = re.sub(r"\s*@font-face \{.*?\}", "", console.export_svg(title="loopos"), flags=re.DOTALL)
    (ASSETS / "terminal.svg").write_text(
        picture.replace("Fira Code", "ui-monospace, Menlo, Consolas"), encoding="utf-8"
    )


def draw_report(page: Path) -> None:
    """Its pages side by side, without the table of settings, which repeats the config."""
    import pypdfium2
    import weasyprint
    from PIL import Image

    style = weasyprint.CSS(string="@page { size: 760px 1120px; margin: 14px 22px } body { max-width: none; margin: 0 }")
    document = pypdfium2.PdfDocument(weasyprint.HTML(filename=str(page)).write_pdf(stylesheets=[style]))
    pages = [each.render(scale=1.0).to_pil() for each in document][:MOST_PAGES]
    sheet = Image.new("RGB", (sum(each.width for each in pages), pages[0].height), "white")
    for number, each in enumerate(pages):
        sheet.paste(each, (number * pages[0].width, 0))
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(ASSETS / "report.png", optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_terminal(recorded(folder))
        draw_report(folder / "outputs" / "my_run" / "report.html")


if __name__ == "__main__":
    main()
