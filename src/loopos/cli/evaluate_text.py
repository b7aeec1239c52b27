"""`loopos evaluate` on running text: perplexity and bits per byte of a language model."""

from __future__ import annotations

import time

from loopos.cli.answers import say, say_json, table
from loopos.cli.opened_models import require_language_model
from loopos.cli.outcome import note
from loopos.cli.process import restart_with_settings
from loopos.cli.quiet import hush_libraries
from loopos.cli.sampling_options import place_diagnostics, refuse
from loopos.config.figures import as_time
from loopos.data.decoding import TextRules
from loopos.data.rows import read_plain_text
from loopos.models.resolve import ModelRef

_LINE_EVERY_SECONDS = 10.0


def run(
    model: ModelRef,
    source: str,
    rules: TextRules,
    *,
    window: int | None,
    stride: int | None,
    device: str,
    precision: str,
    as_json: bool,
    verbose: bool,
) -> int:
    """Measures and prints. Raises `UserError`."""
    refuse(list(place_diagnostics(device, precision)))
    text = read_plain_text(source, rules)
    require_language_model(model)
    restart_with_settings()
    hush_libraries(verbose=verbose)
    from loopos.evaluation.perplexity import text_loss
    from loopos.models.folders import open_generation_model
    from loopos.training.precision import pick_device

    chosen = None if precision == "auto" else precision
    opened = open_generation_model(model, device=pick_device(device).type, precision=chosen)
    began = last_line = time.monotonic()

    def progress(completed: int, total: int) -> None:
        nonlocal last_line
        if (now := time.monotonic()) - last_line > _LINE_EVERY_SECONDS:
            last_line = now
            note(f"{completed:,} of {total:,} tokens · {completed / (now - began):,.0f} tokens/s")

    found = text_loss(opened.model, opened.tokenizer, text, window=window, stride=stride, note=progress)
    seconds = time.monotonic() - began
    if as_json:
        say_json({"model": model.name, "data": source, "metrics": found.to_dict(), "seconds": seconds})
    else:
        say(f"{model.name} on {source}: {found.tokens:,} tokens, windows of {found.window} in steps of {found.stride}")
        say(table([(name, found.to_dict()[name]) for name in ("perplexity", "loss", "bits_per_byte")]))
        say(f"  {as_time(seconds)}")
    return 0
