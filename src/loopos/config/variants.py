"""The tables of named variants, and the decorators by which packages of users add their own.

A row names a function, by reference where it is built in, and says what the function needs, so that configs are checked
and runs are planned without torch. `methods` has the table of training methods; `registry` finds what is in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from loopos.config.registry import Reference, Registry, Target, loaded, summary_of

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class FunctionRow:
    """A variant that is one function or class, without needs."""

    function: Target

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return summary_of(self.function)

    def load(self) -> Any:
        """The function or class itself; importing one that is built in may import torch."""
        return loaded(self.function)


def by_reference(module: str, names: Mapping[str, str]) -> dict[str, FunctionRow]:
    """Rows of functions of one module: name of the variant → name of the function."""
    return {name: FunctionRow(Reference(f"{module}:{function}")) for name, function in names.items()}


@dataclass(frozen=True, slots=True)
class RewardRow:
    """A reward function, or a class whose objects are called as one. `technical`: its options that say how a score is
    computed and not what it is, so that a resumed run may change them.
    """

    function: Target
    technical: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What it scores, in a line."""
        return summary_of(self.function)

    def load(self) -> Any:
        """The function or class itself."""
        return loaded(self.function)


def _reward(function: str, *technical: str) -> RewardRow:
    return RewardRow(Reference(f"loopos.rl.{function}"), technical)


_ENDPOINT = ("base_url", "api_key_env", "concurrency", "retries", "request_timeout", "max_requests", "max_total_tokens")

REWARDS: Registry[RewardRow] = Registry(
    "reward function",
    {
        "auto": _reward("reward_functions:automatic_answer"),
        "exact": _reward("reward_functions:exact_answer"),
        "numeric": _reward("reward_functions:numeric_answer"),
        "choice": _reward("reward_functions:choice_answer"),
        "multiple_choice": _reward("reward_functions:choice_answer"),
        "math_verify": _reward("reward_functions:math_answer"),
        "reasoning_gym": _reward("reward_functions:reasoning_gym_answer"),
        "regex": _reward("reward_functions:regular_expression"),
        "json_schema": _reward("reward_functions:json_schema"),
        "code_tests": _reward("code_tests:CodeTests", "workers"),
        "steps_format": _reward("reward_functions:steps_format"),
        "length_window": _reward("reward_functions:length_window"),
        "repetition": _reward("reward_functions:repetition"),
        "language": _reward("reward_functions:language"),
        "judge": _reward("judge_endpoint:JudgeEndpoint", *_ENDPOINT),
    },
    decorator="register_reward",
    adopt=RewardRow,
)


def register_reward(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the reward `name`: `function(prompts, responses)` or
    `function(prompts, responses, rows)` → one number or None (not judged) per response; it may be async. A class is
    made with the options, and its object called so.
    """

    def registered(function: Function) -> Function:
        REWARDS.register(name, RewardRow(function), source=function.__module__, decorated=function)
        return function

    return registered


def registering(registry: Registry[FunctionRow], name: str) -> Callable[[Function], Function]:
    """A decorator that registers a function or class under a name."""

    def registered(function: Function) -> Function:
        registry.register(name, FunctionRow(function), source=function.__module__, decorated=function)
        return function

    return registered


@dataclass(frozen=True, slots=True)
class LossRow:
    """A loss. `methods`: the training methods whose config may name it; `tasks`: of `fine_tuning`, the tasks that it
    fits. `returns`: one number per row, which the objective adds up, or their sum.

    Letters: N rows, C outputs, P pairs, k heads. A loss of `fine_tuning` is called as `loss(outputs, targets)`: outputs
    `[N, C]` and targets `[N]` of classes, both `[N, C]` of labels, both `[N]` of regression; it may have the parameters
    class_weights, label_smoothing and delta. One of `reward_model` is called as `loss(better, worse)`, both `[P, k]`;
    it may have the parameters probabilities and margins. One of "preference" (`dpo` and its relatives) is called as
    `loss(pairs, settings)`, as `functional.preference_losses` describes; `reference`: whether it reads the reference's
    log-probabilities, `ranks`: whether it compares ranks within a step, `reads`: the keys of `preference` that it reads
    besides beta, None for any. One of "distillation" is called as `loss(student, teacher, settings)`, log-probabilities
    `[R, K]` of both over K outcomes, as `functional.distillation_loss` describes, and returns `[R]`; `on_policy`:
    whether it is a loss of tokens that the student sampled; `reads`: the keys of `distillation` that it reads.
    """

    function: Target
    methods: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    returns: Literal["rows", "sum"] = "rows"
    reference: bool = True
    ranks: bool = False
    reads: tuple[str, ...] | None = None
    on_policy: bool = False

    @property
    def summary(self) -> str:
        """What it computes, in a line."""
        return f"{summary_of(self.function)} ({', '.join(self.tasks or self.methods)})"


TASKS = ("classification", "multi_label", "regression")
TASK_LOSSES = {"classification": "cross_entropy", "multi_label": "binary_cross_entropy"}
"""The loss of a task where the config names none; that of regression is `model.regression_loss`."""


def _head_loss(function: str, task: str) -> LossRow:
    return LossRow(Reference(f"loopos.functional.losses:{function}"), ("fine_tuning",), (task,), "sum")


PREFERENCE = "preference"
"""What stands for the methods of preference optimization (`dpo` and its relatives) in `LossRow.methods`."""


def _preference_loss(function: str, *reads: str, reference: bool = True, ranks: bool = False) -> LossRow:
    target = Reference(f"loopos.functional.preference_losses:{function}")
    return LossRow(target, (PREFERENCE,), reference=reference, ranks=ranks, reads=reads)


DISTILLATION = "distillation"
"""The method of distillation in `LossRow.methods`."""


def _distillation_loss(function: str, *reads: str, on_policy: bool = False) -> LossRow:
    target = Reference(f"loopos.functional.distillation_loss:{function}")
    return LossRow(target, (DISTILLATION,), reads=reads, on_policy=on_policy)


_SMOOTHING, _DIVERGENCE, _MARGINS, _SOFT = "label_smoothing", "divergence", "margins", "soft_labels"

LOSSES: Registry[LossRow] = Registry(
    "loss",
    {
        "cross_entropy": _head_loss("cross_entropy_sum", "classification"),
        "binary_cross_entropy": _head_loss("binary_cross_entropy_sum", "multi_label"),
        "mse": _head_loss("squared_error_sum", "regression"),
        "huber": _head_loss("huber_sum", "regression"),
        "bradley_terry": LossRow(Reference("loopos.functional.preference_loss:bradley_terry"), ("reward_model",)),
        "sigmoid": _preference_loss("sigmoid", _SMOOTHING, _DIVERGENCE, _MARGINS, _SOFT),
        "sigmoid_norm": _preference_loss("sigmoid_norm", _SMOOTHING, _DIVERGENCE, _MARGINS, _SOFT),
        "robust": _preference_loss("robust", _SMOOTHING, _DIVERGENCE, _MARGINS, _SOFT),
        "ipo": _preference_loss("ipo", _DIVERGENCE),
        "hinge": _preference_loss("hinge", _DIVERGENCE, _MARGINS),
        "exo": _preference_loss("exo", _SMOOTHING, _DIVERGENCE, _MARGINS),
        "nca": _preference_loss("nca"),
        "bco": _preference_loss("bco"),
        "sppo": _preference_loss("sppo"),
        "aot": _preference_loss("aot", _SMOOTHING, _SOFT, ranks=True),
        "apo_zero": _preference_loss("apo_zero"),
        "apo_down": _preference_loss("apo_down"),
        "discopop": _preference_loss("discopop", _DIVERGENCE, _MARGINS, "discopop_temperature"),
        "simpo": _preference_loss("simpo", _SMOOTHING, _MARGINS, _SOFT, "simpo_margin", reference=False),
        "cpo": _preference_loss("cpo", _SMOOTHING, _MARGINS, _SOFT, reference=False),
        "orpo": _preference_loss("orpo", _SMOOTHING, _SOFT, reference=False),
        "sft": _preference_loss("likelihood", reference=False),
        "forward_kl": _distillation_loss("forward_kl"),
        "reverse_kl": _distillation_loss("reverse_kl"),
        "jsd": _distillation_loss("jsd", "beta"),
        "sampled_reverse_kl": _distillation_loss("sampled_reverse_kl", on_policy=True),
    },
    decorator="register_loss",
    adopt=lambda function: LossRow(function, ("fine_tuning", "reward_model"), TASKS),
)


def register_loss(
    name: str, *, methods: tuple[str, ...], tasks: tuple[str, ...] = TASKS
) -> Callable[[Function], Function]:
    """Registers the decorated function as the loss `name` of these training methods. It returns one number per row,
    never their mean: the update divides, by the count of the whole step. tasks: as in `LossRow`.
    """

    def registered(function: Function) -> Function:
        row = LossRow(function, methods, tasks if "fine_tuning" in methods else ())
        LOSSES.register(name, row, source=function.__module__, decorated=function)
        return function

    return registered


@dataclass(frozen=True, slots=True)
class FormatRow:
    """A format of rows. `function`: a row as the file holds it → the same row in columns that LoopOS reads; None for a
    format that is found by its columns. `about`: of such a format, what it is.
    """

    function: Target | None
    about: str = ""

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return self.about if self.function is None else summary_of(self.function)


def _by_columns(**formats: str) -> dict[str, FormatRow]:
    return {name: FormatRow(None, f"found by its columns: {columns}") for name, columns in formats.items()}


FORMATS: Registry[FormatRow] = Registry(
    "format",
    _by_columns(
        labeled="text, perhaps text_pair, and label",
        conversations="messages",
        instructions="instruction, perhaps input, and output",
        demonstrations="problem, reasoning and answer",
        completions="prompt and completion",
        text="text",
        pairs="prompt, chosen and rejected; implicit pairs lack the prompt",
        judged_pairs="prompt, response_1, response_2 and preference",
        groups="prompt, responses, and scores or ranking",
        thumbs="prompt, completion and label, or messages and label",
        steps="prompt, completions (the steps) and labels",
        prompts="prompt",
        openai="input, preferred_output and non_preferred_output",
        ms_swift="messages, and rejected_response or rejected_messages",
        shp="history, human_ref_A, human_ref_B and labels",
        helpsteer2="prompt, response_1, response_2 and preference_strength",
        helpsteer3="context, response1, response2 and overall_preference",
        safe_rlhf="prompt, response_0, response_1 and better_response_id",
    )
    | {
        # Also found by columns, of which rows of these formats may lack one.
        "nectar": FormatRow(Reference("loopos.data.preference_layouts:nectar")),
        "ultrafeedback": FormatRow(Reference("loopos.data.preference_layouts:ultrafeedback")),
    },
    decorator="register_format",
    adopt=FormatRow,
)


def register_format(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the format `name`: `function(row)` takes a row of a file, a dict of its
    columns, and returns a dict of columns that LoopOS reads, such as prompt, chosen and rejected. It raises ValueError
    for a row that is not in the format.
    """

    def registered(function: Function) -> Function:
        FORMATS.register(name, FormatRow(function), source=function.__module__, decorated=function)
        return function

    return registered


@dataclass(frozen=True, slots=True)
class MergeRow:
    """A merge method. `base`: whether it needs the base model. `normalizes`: whether it divides by the sum of the
    weights by default, `elects`: of their absolute values. `uses`: the keys of a recipe that have an effect. `weighs`:
    whether the models have weights. `fewest`, `most`: models, None for any number.
    """

    function: Target
    base: bool = False
    normalizes: bool = False
    elects: bool = False
    uses: tuple[str, ...] = ()
    weighs: bool = True
    fewest: int = 1
    most: int | None = None
    about: str = ""

    @property
    def summary(self) -> str:
        """What it computes, in a line."""
        return self.about or summary_of(self.function)


def _merging(function: str, *uses: str, **facts: Any) -> MergeRow:
    return MergeRow(Reference(f"loopos.merging.methods:{function}"), uses=uses, **facts)


_WHOLE: Mapping[str, Any] = {"weighs": False, "fewest": 2}
_DENSE = ("scale", "density", "normalize")
_CRUMBS = ("scale", "drop_smallest", "drop_largest", "normalize")
_ELECTS = {"base": True, "normalizes": True, "elects": True}

MERGE_PARAMETERS = ("t", "scale", "density", "epsilon", "drop_smallest", "drop_largest", "normalize")
"""The parameters of a merge recipe."""

MERGE_METHODS: Registry[MergeRow] = Registry(
    "merge method",
    {
        "linear": _merging("merge_linear", "normalize", normalizes=True),
        # These two are steps of `merging.merge` around the arithmetic, and have no function of tensors.
        "greedy_soup": MergeRow(
            Reference("loopos.merging.methods:merge_linear"),
            normalizes=True,
            uses=("normalize",),
            about="The mean of the models, added one by one where a metric on validation rows improves",
            **_WHOLE,
        ),
        "slerp": _merging("merge_slerp", "t", weighs=False, fewest=2, most=2),
        "task_arithmetic": _merging("merge_task_arithmetic", "scale", "normalize", base=True),
        "ties": _merging("merge_ties", *_DENSE, **_ELECTS),
        "dare_linear": _merging("merge_dare_linear", *_DENSE, base=True),
        "dare_ties": _merging("merge_dare_ties", *_DENSE, **_ELECTS),
        "della_linear": _merging("merge_della_linear", *_DENSE, "epsilon", base=True),
        "della": _merging("merge_della", *_DENSE, "epsilon", **_ELECTS),
        "breadcrumbs": _merging("merge_breadcrumbs", *_CRUMBS, base=True),
        "breadcrumbs_ties": _merging("merge_breadcrumbs_ties", *_CRUMBS, **_ELECTS),
        "model_stock": _merging("merge_model_stock", base=True, **_WHOLE),
        "passthrough": MergeRow(
            Reference("loopos.merging.methods:merge_linear"),
            weighs=False,
            about="Layers of the models, copied one after another",
        ),
    },
    decorator="register_merge_method",
    adopt=lambda function: MergeRow(function, uses=MERGE_PARAMETERS),
)


def register_merge_method(
    name: str,
    *,
    base: bool = False,
    normalizes: bool = False,
    uses: tuple[str, ...] = (),
    weighs: bool = True,
    fewest: int = 1,
) -> Callable[[Function], Function]:
    """Registers the decorated function as the merge method `name`: `function(inputs: merging.methods.MergeInputs)`
    returns one tensor. The arguments are as in `MergeRow`.
    """

    def registered(function: Function) -> Function:
        row = MergeRow(function, base=base, normalizes=normalizes, uses=uses, weighs=weighs, fewest=fewest)
        MERGE_METHODS.register(name, row, source=function.__module__, decorated=function)
        return function

    return registered


FLOATS = ("f32", "f16", "bf16")
"""Number formats of weights that are not quantized."""
_GGUF_TYPES = (*FLOATS, "q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class ExporterRow:
    """A format of exports. `types`: the number formats that it supports; the first is the default, "" the model's own.
    `function`: writes the folder; None for the formats that `exporting` writes and verifies itself, `about` says what
    such a one is.
    """

    function: Target | None
    types: tuple[str, ...]
    about: str = ""

    @property
    def summary(self) -> str:
        """What it writes, in a line."""
        return self.about if self.function is None else summary_of(self.function)


EXPORTERS: Registry[ExporterRow] = Registry(
    "export format",
    {
        "huggingface": ExporterRow(None, ("", *FLOATS), "A folder that transformers opens"),
        "gguf": ExporterRow(None, ("f16", *_GGUF_TYPES), "A GGUF file, for llama.cpp and others"),
        "adapter": ExporterRow(None, ("", *FLOATS), "A folder that PEFT opens"),
        "modelfile": ExporterRow(None, ("f16", *_GGUF_TYPES), "A GGUF file and a Modelfile, for Ollama"),
        "onnx": ExporterRow(None, ("f32", "f32"), "An ONNX file, for onnxruntime and others"),
    },
    decorator="register_exporter",
    adopt=lambda function: ExporterRow(function, ("", *FLOATS)),
)


def register_exporter(name: str, *, types: tuple[str, ...] = ("", *FLOATS)) -> Callable[[Function], Function]:
    """Registers the decorated function as the export format `name`: `function(folder, out, number_type)` reads the
    model's folder, which transformers opens, and writes into the folder `out`; it returns notes for the report, or
    None. types: as in `ExporterRow`.
    """

    def registered(function: Function) -> Function:
        EXPORTERS.register(name, ExporterRow(function, types), source=function.__module__, decorated=function)
        return function

    return registered


TRACKERS: Registry[FunctionRow] = Registry(
    "tracker",
    by_reference("loopos.storage.events", {"tensorboard": "TensorBoardTracker"}),
    decorator="register_tracker",
    adopt=FunctionRow,
)


def register_tracker(name: str) -> Callable[[Function], Function]:
    """Registers the decorated class as the tracker `name`: `tracker(run_dir, resumed_step=None)` makes an object with
    `log(step, metrics)`, which gets the numbers of each event by the names `event/name`, and `close()`.
    """
    return registering(TRACKERS, name)


TOOL_PARSERS: Registry[FunctionRow] = Registry(
    "parser of tool calls",
    by_reference(
        "loopos.data.tool_calls",
        {"hermes": "hermes", "mistral": "mistral", "llama3": "llama3", "json": "plain_json"},
    ),
    decorator="register_tool_parser",
    adopt=FunctionRow,
)


def register_tool_parser(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the parser of tool calls `name`: `scan(text, start, ended)` returns the next
    `data.tool_calls.Part` of a turn's text, or None while more text is needed to tell.
    """
    return registering(TOOL_PARSERS, name)


ENVIRONMENTS: Registry[FunctionRow] = Registry(
    "environment",
    by_reference(
        "loopos.rl.packaged_environments",
        {"calculator_search": "CalculatorSearch", "treasure_grid": "TreasureGrid"},
    ),
    decorator="register_environment",
    adopt=FunctionRow,
)


def register_environment(name: str) -> Callable[[Function], Function]:
    """Registers the decorated class as the environment `name`. `reset(**row)` returns the messages of an episode;
    public methods with type hints and a docstring are tools; `reward(messages, row)`, which it may lack, is the score.
    """
    return registering(ENVIRONMENTS, name)
