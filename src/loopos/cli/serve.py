"""`loopos serve`: serves a trained model over an OpenAI-compatible HTTP API until a signal."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopos.cli.options import (
    Device,
    Precision,
    ToolParser,
    TrustRemoteCode,
    Verbose,
    argument,
    device_diagnostics,
    refuse,
)
from loopos.cli.outcome import note
from loopos.cli.process import prepare_to_compute
from loopos.config.diagnostics import MissingRequirement
from loopos.config.figures import as_bytes
from loopos.serving.limits import ServingLimits, address_diagnostics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loopos.models.resolve import ModelRef
    from loopos.serving.http import Service
    from loopos.serving.language import LanguageService
    from loopos.serving.metrics import ServingMetrics

_PACKAGES = ("starlette", "uvicorn")

ServedModel = Annotated[
    str,
    argument(
        "MODEL", 'Run folder or model folder of any kind; "smollm2-135m", weights file or hub id of a language model.'
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The options of `loopos serve`."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; a public one requires an API key."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0: any free port."})
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="LOOPOS_API_KEY", help="API key for requests; better set in the environment."),
    ] = None
    name: str | None = field(default=None, metadata={"help": "Model name for clients; default: the folder's name."})
    tool_parser: ToolParser = "auto"
    limits: ServingLimits
    device: Device = "auto"
    precision: Precision = "auto"
    trust_remote_code: TrustRemoteCode = False
    verbose: Verbose = False


def run(source: ServedModel, options: ServeOptions) -> int:
    """Serves until a signal. Raises `UserError`, if possible before torch is imported."""
    from loopos.config.extras import install_command
    from loopos.models.resolve import resolve_trained

    refuse(
        [
            *address_diagnostics(options.host, options.port, options.api_key),
            *options.limits.diagnostics(),
            *device_diagnostics(options.device, options.precision),
        ]
    )
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingRequirement(f"loopos serve needs {' and '.join(missing)}; run\n  {install_command('serve')}")
    model = resolve_trained(source)
    # The model runs in a thread beside the one that serves clients: bound to one core they would wait for each other.
    prepare_to_compute(verbose=options.verbose, binds_threads=False)
    from loopos.serving.metrics import ServingMetrics
    from loopos.serving.server import address_of, listening, serve

    # Before the model is loaded, so that a port in use fails at once.
    with listening(options.host, options.port, options.limits) as bound:
        metrics = ServingMetrics()
        name = options.name or name_of(source)
        service = _service(model, name, options, metrics)

        def began(_: Callable[[], None]) -> None:
            note(f"{name}: {service.kind} at {address_of(bound)} ({', '.join(service.endpoints)}); Ctrl-C ends")

        serve(service, metrics, bound, options.limits, api_key=options.api_key, began=began)
    note("stopped")
    return 0


def name_of(source: str) -> str:
    """The name of a served model: that of its file or folder (of the run, not of its model/ folder), else `source`."""
    path = Path(source)
    if not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _service(model: ModelRef, name: str, options: ServeOptions, metrics: ServingMetrics) -> Service:
    from loopos.training.precision import pick_device

    if model.kind == "language":
        return _language(model, name, options, metrics)
    from loopos.evaluation.predictor import Predictor
    from loopos.evaluation.reward_predictor import RewardPredictor
    from loopos.serving.heads import ClassifyHead, HeadService, ScoreHead

    device = pick_device(options.device).type
    if model.kind == "reward":
        return HeadService(ScoreHead(RewardPredictor.open(model, device=device)), name, options.limits, metrics)
    precision = None if options.precision == "auto" else options.precision
    predictor = Predictor.open(model, device=device, precision=precision)
    return HeadService(ClassifyHead(predictor), name, options.limits, metrics)


def _language(model: ModelRef, name: str, options: ServeOptions, metrics: ServingMetrics) -> LanguageService:
    from loopos.cli.opened_models import open_reasoner
    from loopos.models.language_ensemble import members_of
    from loopos.serving.language import LanguageService

    reasoner = open_reasoner(
        model,
        device=options.device,
        precision=options.precision,
        max_rows=options.limits.max_rows,
        trust_remote_code=options.trust_remote_code,
    )
    service = LanguageService(reasoner, name, options.limits, metrics, tool_parser=options.tool_parser)
    note(reasoner.template.summary)
    note(reasoner.engine.summary)
    most = sum(map(_keys_and_values, members_of(reasoner.model))) * service.context * options.limits.max_rows
    note(f"{options.limits.max_rows} rows of {service.context} tokens: KV cache of at most {as_bytes(most)}")
    return service


def _keys_and_values(model: PreTrainedModel) -> int:
    """Bytes of keys and values per token; 0 for a model without attention."""
    config = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", 0)
    if not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)
