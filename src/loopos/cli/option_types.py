"""The options and arguments that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopos.config.paths import expanded


def path(text: str) -> Path:
    """A path from the command line. Expands "~", which no shell expands in `--output=~/run`."""
    return Path(expanded(text))


Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="Config file, .json or .yaml.", show_default=False, parser=path)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE", help="Overrides of config keys, e.g. training.learning_rate=1e-4.", show_default=False
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="Output folder of a run, or its model/ folder.", show_default=False, parser=path
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="ROLE=COLUMN",
        help="Column for a role (text, text_pair, label; problem, reasoning, answer, messages ...); repeatable.",
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        metavar="NAME",
        help="Encoding of text files, e.g. cp1252; default: UTF-8.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also show messages and progress bars of the libraries.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow a hub model to run its own Python code in this run.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run folder or model folder; for a language model also a weights file or hub id.",
        show_default=False,
        parser=expanded,
    ),
]
LanguageModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help='Run folder, model folder, "smollm2-135m", weights file or hub id of a language model.',
        show_default=False,
        parser=expanded,
    ),
]
Precision = Annotated[
    str, typer.Option("--precision", help="fp32, bf16 or fp16; auto: as trained, fp32 for other models.")
]
Temperature = Annotated[float, typer.Option("--temperature", help="Sampling temperature; 0: greedy decoding.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the k most likely tokens; 0: all tokens.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Sample from the smallest set of top tokens with this probability.")
]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below this fraction of the top token's probability.")]
TypicalP = Annotated[float, typer.Option("--typical-p", help="Locally typical sampling: probability mass to keep.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Penalizes tokens that already occur; 1 turns it off.")
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="Subtracted once from the logits of tokens that already occur.")
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="Subtracted from a token's logit for each occurrence.")
]
NoRepeatNgram = Annotated[int, typer.Option("--no-repeat-ngram", help="Never repeat an n-gram of this size; 0: off.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Maximum new tokens per completion.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends a completion; repeatable.")
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
Strategy = Annotated[
    str,
    typer.Option("--strategy", help="Answer strategy: single, self_consistency:8, best_of_n:4 or step_beam:2x4."),
]
RankingModel = Annotated[
    str | None, typer.Option("--reward-model", help="Reward model that ranks the chains of --strategy best_of_n.")
]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Reasoning steps before the answer is forced.")]
MaxStepTokens = Annotated[int | None, typer.Option("--max-step-tokens", help="Maximum tokens per step.")]
MinThinkingTokens = Annotated[
    int, typer.Option("--min-thinking-tokens", help="Minimum reasoning tokens before the answer.")
]
MaxThinkingTokens = Annotated[
    int | None, typer.Option("--max-thinking-tokens", help="Reasoning tokens before the answer is forced.")
]
SystemText = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")]

Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; repeatable.")]
Input = Annotated[
    str | None,
    typer.Option("--input", metavar="FILE", help="One prompt per line, a data file, or - for stdin.", parser=expanded),
]
LinesFile = Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines to this file.", parser=path)]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON line per completion to standard output.")]
Steps = Annotated[bool, typer.Option("--steps", help="Show each step with its logprob, then the answer.")]
Completions = Annotated[int, typer.Option("--samples", "-n", help="Completions per prompt.")]
Chains = Annotated[int, typer.Option("--samples", "-n", help="Sampled chains per problem, for a majority vote.")]
NumBeams = Annotated[int | None, typer.Option("--num-beams", help="Width of a token-level beam search.")]
Raw = Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt text as it is.")]
Data = Annotated[
    str | None,
    typer.Argument(metavar="DATA", help="Data file; omit with --tasks.", show_default=False, parser=expanded),
]
Tasks = Annotated[list[str] | None, typer.Option("--tasks", metavar="NAME[,NAME]", help="lm-eval tasks; repeatable.")]
TaskFolder = Annotated[
    Path | None, typer.Option("--task-folder", help="Folder of your own lm-eval .yaml tasks.", parser=path)
]
NumFewshot = Annotated[int | None, typer.Option("--num-fewshot", help="Few-shot examples before each task question.")]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the chat template to tasks.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", help="accuracy, loss or perplexity; repeatable.")]
PassK = Annotated[list[int] | None, typer.Option("--pass-k", help="k of pass@k and majority@k; repeatable.")]
Checker = Annotated[
    str, typer.Option("--checker", help="auto, exact, numeric, choice, math_verify, reasoning_gym, module:function.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Maximum number of rows to read.")]
Window = Annotated[int | None, typer.Option("--window", help="Plain text: context window in tokens; default: 1024.")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Plain text: tokens between two windows; default: half a window.")
]
RecordsFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="One JSON line per problem; for a model with a head, every row, mistakes first (.jsonl, .csv, .tsv).",
        parser=path,
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="For models with a head: metrics, classes, confusion or residuals, and mistakes as an HTML page.",
        parser=path,
    ),
]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be used.")]

ModelA = Annotated[
    str, typer.Argument(metavar="A", help="Language model, as for generate.", show_default=False, parser=expanded)
]
ModelB = Annotated[
    str, typer.Argument(metavar="B", help="Language model to compare A with.", show_default=False, parser=expanded)
]
PromptsFile = Annotated[
    str,
    typer.Argument(
        metavar="PROMPTS", help="One prompt per line, a data file, or - for stdin.", show_default=False, parser=expanded
    ),
]
Judge = Annotated[
    str,
    typer.Option(
        "--judge",
        metavar="JUDGE",
        help="Reward-model run, or module:function.",
        show_default=False,
        parser=expanded,
    ),
]
Pairs = Annotated[int, typer.Option("--samples", "-n", help="Answers of each model per prompt, compared in pairs.")]
PairsFile = Annotated[Path | None, typer.Option("--output", "-o", help="Write one JSON line per pair.", parser=path)]

ServedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help='Run folder or model folder of any kind; "smollm2-135m", weights file or hub id of a language model.',
        show_default=False,
        parser=expanded,
    ),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; a public one requires an API key.")]
Port = Annotated[int, typer.Option("--port", help="Port to listen on; 0: any free port.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="LOOPOS_API_KEY", help="API key for requests; better set in the environment."),
]
ServedName = Annotated[str | None, typer.Option("--name", help="Model name for clients; default: the folder's name.")]
MaxRows = Annotated[int, typer.Option("--max-rows", help="Maximum completions decoded together.")]
MaxContext = Annotated[int, typer.Option("--max-context", help="Maximum tokens of prompt and completion.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Maximum new tokens per completion.")]
MaxQueue = Annotated[int, typer.Option("--max-queue", help="Maximum waiting completions; more get status 429.")]
MaxBody = Annotated[int, typer.Option("--max-body", help="Maximum request size in bytes; larger gets status 413.")]
MaxSeconds = Annotated[
    float, typer.Option("--max-seconds", help="Maximum seconds per request; longer gets status 408.")
]
MaxLag = Annotated[int, typer.Option("--max-lag", help="Tokens that a streaming client may lag before it is cut off.")]
MaxMessages = Annotated[int, typer.Option("--max-messages", help="Maximum messages per request; more get status 400.")]
MaxConnections = Annotated[int, typer.Option("--max-connections", help="Maximum open connections; others wait.")]
HeaderSeconds = Annotated[float, typer.Option("--header-seconds", help="Timeout for a request header (seconds).")]
IdleSeconds = Annotated[float, typer.Option("--idle-seconds", help="Idle timeout of a connection (seconds).")]
GraceSeconds = Annotated[
    float, typer.Option("--grace-seconds", help="Seconds for running requests to finish at shutdown.")
]

# For commands that read a recipe: None leaves the recipe's value or its default.
ModelOrRecipe = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE",
        help="Run folder, model folder, weights file or hub id; or a recipe (.json or .yaml).",
        show_default=False,
        parser=expanded,
    ),
]
ChangedOutput = Annotated[
    Path, typer.Option("--output", "-o", help="New output folder for model, recipe and report.", parser=path)
]
CalibrationRows = Annotated[
    int | None, typer.Option("--calibration-rows", help="Rows of calibration text; default: 128.")
]
CalibrationTokens = Annotated[
    int | None, typer.Option("--calibration-tokens", help="Tokens per calibration row; default: 512.")
]
CalibrationSeed = Annotated[int | None, typer.Option("--seed", help="Seed for choosing calibration rows; default: 0.")]
EvaluatedOn = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="FILE",
        help="Measure quality on this file: text for perplexity, labeled rows for a head.",
        parser=expanded,
    ),
]
RecipeDevice = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.")]
