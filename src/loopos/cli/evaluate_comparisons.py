"""`loopos evaluate` on comparisons: the accuracy of a reward model's scores, or of a policy's implicit rewards.

Prints a table or one JSON object; with -o every pair, the largest errors first. The reference of a policy is where its
run began, unless another is named.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopos.cli.answers import output_format, refuse_unwritable, rendered, say, say_json, table, write_whole
from loopos.cli.options import device_diagnostics, refuse
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.config.diagnostics import UserError
from loopos.config.figures import as_time, figure
from loopos.config.paths import NEW_WEIGHTS

if TYPE_CHECKING:
    from loopos.data.decoding import TextRules
    from loopos.evaluation.comparison_judgment import ComparisonJudgment
    from loopos.models.resolve import ModelRef

NO_REFERENCE = "none"
"""The value of --reference that asks for likelihoods only."""
_OF_POLICIES = ("--output", "--precision", "--limit", "--reference")
_OF_REWARD_MODELS = ("--output", "--limit")
_WITH_INTERVAL = ("pair_accuracy", "likelihood_accuracy", "likelihood_per_token_accuracy")
_HIDDEN = frozenset(f"{name}_{end}" for name in _WITH_INTERVAL for end in ("low", "high"))


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """The options of `loopos evaluate` that apply to comparisons. `of_language`: all options of language models that
    differ from their defaults, as written on the command line.
    """

    of_language: Sequence[str]
    reference: str | None
    limit: int | None
    output: Path | None
    report: Path | None
    skip_bad_rows: bool
    device: str
    precision: str
    json: bool
    verbose: bool


@dataclass(frozen=True)
class Rewards:
    """What makes a policy's implicit rewards: the reference's name, None for likelihoods, and β. `as_text`: whether the
    policy was trained on plain texts.
    """

    reference: str | None
    beta: float
    as_text: bool


def applies_to(source: str, columns: Mapping[str, str], rules: TextRules, options: ComparisonOptions) -> bool:
    """Whether rows for a language model are taken as comparisons: by --reference or by their columns, unless --metric
    asks for figures that other rows have, such as the loss of their conversations.
    """
    from loopos.data.row_check import holds_comparisons

    if options.reference is not None:
        return True
    return "--metric" not in options.of_language and holds_comparisons(source, columns, rules)


def run(model: ModelRef, source: str, columns: Mapping[str, str], rules: TextRules, options: ComparisonOptions) -> int:
    """Measures and prints. Raises `UserError`."""
    is_policy = model.kind == "language"
    allowed = _OF_POLICIES if is_policy else _OF_REWARD_MODELS
    kind = "comparisons" if is_policy else "a reward model"
    refuse([f"{name}: does not apply to {kind}" for name in options.of_language if name not in allowed])
    diagnostics = list(device_diagnostics(options.device, options.precision))
    if options.limit is not None and options.limit < 1:
        diagnostics.append(f"--limit: got {options.limit}; expected 1 or more")
    refuse(diagnostics)
    file_format = output_format(options.output, None)
    for name, file in (("--output", options.output), ("--report", options.report)):
        if file is not None:
            refuse_unwritable(file, name, source=source)
    if options.report is not None and options.report.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report: got {options.report}; expected a file that ends in .html")
    from loopos.data.row_check import check_comparisons

    check_comparisons(source, columns, rules)
    began = time.monotonic()
    about: dict[str, Any] = {"model": model.name, "data": source}
    if is_policy:
        rewards = rewards_of(model, options.reference)
        about |= {"reference": rewards.reference, "beta": rewards.beta}
        judgment = _judge_policy(model, rewards, source, columns, rules, options)
    else:
        judgment = _judge_rewards(model, source, columns, rules, options)
    _print(about, judgment, time.monotonic() - began, as_json=options.json)
    if options.output is not None:
        records = judgment.records()
        write_whole(options.output, rendered(records, file_format))
        note(f"{options.output}: {len(records):,} pairs, largest errors first")
    if options.report is not None:
        from loopos.evaluation.blocks import as_html

        write_whole(options.report, as_html(f"{model.name} on {source}", judgment.blocks()), "--report")
        note(f"{options.report}: report")
    return 0


def rewards_of(model: ModelRef, named: str | None) -> Rewards:
    """The reference: `named`, else the weights that the policy's run began from; none for a run whose losses need none,
    and for models without a run. Raises `UserError` for a broken config of the run.
    """
    config = _run_config(model)
    method, data = config.get("computation", {}).get("method", ""), config.get("data", {})
    begun: str | None = data.get("pretrained_weights")
    beta, needs_reference = _preset(method, config.get("preference") or {})
    if begun == NEW_WEIGHTS or not needs_reference:
        begun = None
    reference = None if named == NO_REFERENCE else named or begun
    return Rewards(reference, beta, data.get("chat_template") == "none")


def _run_config(model: ModelRef) -> Mapping[str, Any]:
    """The config of the run that wrote a model folder; empty for others."""
    from loopos.evaluation.run_folder import CONFIG, EVENTS, RunFolder

    folder = model.folder or model.adapter
    if folder is None or not all((folder.parent / name).is_file() for name in (CONFIG, EVENTS)):
        return {}
    return RunFolder(folder.parent).config


def _preset(method: str, section: Mapping[str, Any]) -> tuple[float, bool]:
    """β of a run, and whether its losses read a reference; for other methods those of DPO."""
    from loopos.config.preference import PRESETS
    from loopos.config.variants import LOSSES

    preset = PRESETS.get(method, PRESETS["dpo"])
    chosen = section.get("loss") or preset.losses
    losses = [chosen] if isinstance(chosen, str) else list(chosen)
    beta = section.get("beta") or preset.beta
    return beta, any(LOSSES[name].reference for name in losses)


def _judge_policy(
    model: ModelRef,
    rewards: Rewards,
    source: str,
    columns: Mapping[str, str],
    rules: TextRules,
    options: ComparisonOptions,
) -> ComparisonJudgment:
    from loopos.cli.opened_models import require_language_model
    from loopos.models.resolve import resolve_trained

    require_language_model(model)
    try:
        reference = None if rewards.reference is None else resolve_trained(rewards.reference)
    except UserError as problem:
        if options.reference is not None:
            raise
        raise UserError(
            f"{problem}\nthis is where the run of {model.name} began, and so its reference; name it with --reference, "
            f"or use --reference {NO_REFERENCE} for likelihoods only"
        ) from problem
    prepare_to_compute(verbose=options.verbose)
    from loopos.cli.policy_comparisons import ComparisonRules, Opening, judge_policy
    from loopos.training.precision import pick_device

    how = ComparisonRules(
        columns=columns,
        as_text=rewards.as_text,
        max_rows=options.limit,
        on_bad_row="skip" if options.skip_bad_rows else "error",
        text=rules,
    )
    chosen = None if options.precision == "auto" else options.precision
    opening = Opening(device=pick_device(options.device).type, precision=chosen)
    return judge_policy(model, reference, source, how, opening, beta=rewards.beta)


def _judge_rewards(
    model: ModelRef, source: str, columns: Mapping[str, str], rules: TextRules, options: ComparisonOptions
) -> ComparisonJudgment:
    prepare_to_compute(verbose=options.verbose)
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.training.precision import pick_device

    predictor = RewardPredictor.open(model, device=pick_device(options.device).type)
    return predictor.judge_comparisons(
        source,
        columns,
        max_rows=options.limit,
        on_bad_row="skip" if options.skip_bad_rows else "error",
        rules=rules,
    )


def _print(about: Mapping[str, Any], judgment: ComparisonJudgment, seconds: float, *, as_json: bool) -> None:
    metrics, tables = judgment.metrics, judgment.tables
    if as_json:
        counts = {"rows": len(judgment.rows), "dropped": dict(judgment.dropped)}
        say_json({**about, **counts, "metrics": metrics, **tables, "seconds": seconds})
        return
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in judgment.dropped.items())
    say(f"{about['model']} on {about['data']}: {len(judgment.rows):,} rows{dropped}")
    if "beta" in about:
        beta, reference = figure(about["beta"]), about["reference"]
        kind = "log-probability per token" if reference is None else f"log π/ρ, reference {reference}"
        say(f"  reward: {beta} · {kind}")
    shown = [(name, value, _interval(metrics, name)) for name, value in metrics.items() if name not in _HIDDEN]
    say(table(shown, head=("", "", "95%")))
    if tables["by_margin"]:
        rows = [
            (_range(each["low"], each["high"]), each["pairs"], each["accuracy"], _interval(each, "accuracy"))
            for each in tables["by_margin"]
        ]
        say(table(rows, head=("margin", "pairs", "accuracy", "95%")))
    say(f"  {as_time(seconds)}")


def _interval(figures: Mapping[str, float], name: str) -> str:
    """The interval of a figure as text; empty where it has none."""
    if f"{name}_low" not in figures:
        return ""
    return _range(figures[f"{name}_low"], figures[f"{name}_high"])


def _range(low: float, high: float) -> str:
    return f"{figure(low)} to {figure(high)}"
