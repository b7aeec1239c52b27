"""The options and arguments that several commands share, with their help texts.

Enters: nothing. Leaves: annotated types for the signatures of commands. Left out: what an option does (each command's
own module).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loopos.config.paths import expanded


def path(text: str) -> Path:
    """A path that the command line names, with "~" as the home folder: no shell expands it in `--output=~/run`."""
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
        metavar="RUN", help="Output folder of a run, or its folder model/.", show_default=False, parser=path
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="ROLE=COLUMN",
        help="Column of a role (text, text_pair, label; problem, reasoning, answer, messages ...); may be repeated.",
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        metavar="NAME",
        help="Encoding of text files, such as cp1252; UTF-8 when absent.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the messages and bars of the libraries below too.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a model from a hub run its own Python code, in this run.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run folder or model folder; of a language model also a weights file or hub id.",
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
Temperature = Annotated[float, typer.Option("--temperature", help="Divisor of the logits; 0 takes the likeliest.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from the k likeliest tokens; 0 is all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that hold this probability.")]
MinP = Annotated[float, typer.Option("--min-p", help="Draw from tokens this many times as likely as the likeliest.")]
TypicalP = Annotated[float, typer.Option("--typical-p", help="Draw from tokens of typical surprise that hold this.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Penalizes tokens that already occur; 1 turns it off.")
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="Subtracted once from the logits of tokens that already occur.")
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="Subtracted for each time that a token already occurs.")
]
NoRepeatNgram = Annotated[int, typer.Option("--no-repeat-ngram", help="No n tokens in a row twice; 0 is off.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest completion (tokens).")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends a completion; may be repeated.")
]
Seed = Annotated[int, typer.Option("--seed", help="Fixes every draw.")]
Strategy = Annotated[
    str,
    typer.Option("--strategy", help="How an answer is made: single, self_consistency:8, best_of_n:4 or step_beam:2x4."),
]
RankingModel = Annotated[
    str | None, typer.Option("--reward-model", help="Reward model that ranks the chains of --strategy best_of_n.")
]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Steps after which the answer is forced.")]
MaxStepTokens = Annotated[int | None, typer.Option("--max-step-tokens", help="Longest step (tokens).")]
MinThinkingTokens = Annotated[
    int, typer.Option("--min-thinking-tokens", help="Tokens of reasoning before its end is let through.")
]
MaxThinkingTokens = Annotated[
    int | None, typer.Option("--max-thinking-tokens", help="Tokens of reasoning after which its end is forced.")
]
SystemText = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system's words to the model.")]

Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; may be repeated.")]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="FILE", help="One prompt a line, a data file of problems, or - for stdin.", parser=expanded
    ),
]
LinesFile = Annotated[Path | None, typer.Option("--output", "-o", help="File to write JSON lines to.", parser=path)]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON lines on standard output, one a completion.")]
Steps = Annotated[bool, typer.Option("--steps", help="Show each step with its logprob, then the answer.")]
Completions = Annotated[int, typer.Option("--samples", "-n", help="Completions of each prompt.")]
Chains = Annotated[int, typer.Option("--samples", "-n", help="Chains of each problem, which vote.")]
NumBeams = Annotated[int | None, typer.Option("--num-beams", help="Width of a beam search over tokens.")]
Raw = Annotated[bool, typer.Option("--raw", help="No chat template: the prompt is continued as it stands.")]
Data = Annotated[
    str | None,
    typer.Argument(metavar="DATA", help="Data file; none with --tasks.", show_default=False, parser=expanded),
]
Tasks = Annotated[
    list[str] | None, typer.Option("--tasks", metavar="NAME[,NAME]", help="Tasks of lm-eval; may be repeated.")
]
TaskFolder = Annotated[
    Path | None, typer.Option("--task-folder", help="Tasks of your own, as lm-eval's .yaml files.", parser=path)
]
NumFewshot = Annotated[int | None, typer.Option("--num-fewshot", help="Worked examples before a task's question.")]
Chat = Annotated[bool, typer.Option("--chat", help="Tasks are asked through the chat template.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", help="accuracy, loss or perplexity; may be repeated.")]
PassK = Annotated[list[int] | None, typer.Option("--pass-k", help="k of pass@k and majority@k; may be repeated.")]
Checker = Annotated[
    str, typer.Option("--checker", help="auto, exact, numeric, choice, math_verify, reasoning_gym, module:function.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Rows to read at most.")]
Window = Annotated[
    int | None, typer.Option("--window", help="Plain text: tokens that the model sees at a time; 1024 when absent.")
]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Plain text: tokens between two windows; half a window when absent.")
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
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and count them.")
]

ModelA = Annotated[
    str, typer.Argument(metavar="A", help="Language model, as under generate.", show_default=False, parser=expanded)
]
ModelB = Annotated[
    str, typer.Argument(metavar="B", help="Language model that A is held against.", show_default=False, parser=expanded)
]
PromptsFile = Annotated[
    str,
    typer.Argument(
        metavar="PROMPTS", help="One prompt a line, a data file, or - for stdin.", show_default=False, parser=expanded
    ),
]
Judge = Annotated[
    str,
    typer.Option(
        "--judge",
        metavar="JUDGE",
        help="Run of a reward model, or module:function.",
        show_default=False,
        parser=expanded,
    ),
]
Pairs = Annotated[int, typer.Option("--samples", "-n", help="Answers of each model to a prompt, pair by pair.")]
PairsFile = Annotated[Path | None, typer.Option("--output", "-o", help="Write one JSON line per pair.", parser=path)]

ServedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help='Run folder or model folder of any kind; "smollm2-135m", a weights file or hub id of a language model.',
        show_default=False,
        parser=expanded,
    ),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; one that others reach needs an API key.")]
Port = Annotated[int, typer.Option("--port", help="Port to listen on; 0 is any free one.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="LOOPOS_API_KEY", help="Key that requests must show; better in the environment."),
]
ServedName = Annotated[str | None, typer.Option("--name", help="Name of the model to clients; that of its folder.")]
MaxRows = Annotated[int, typer.Option("--max-rows", help="Completions that decode together.")]
MaxContext = Annotated[int, typer.Option("--max-context", help="Tokens of a prompt and its completion.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="New tokens of one completion.")]
MaxQueue = Annotated[int, typer.Option("--max-queue", help="Completions that wait; more are refused (429).")]
MaxBody = Annotated[int, typer.Option("--max-body", help="Bytes of a request; more are refused (413).")]
MaxSeconds = Annotated[float, typer.Option("--max-seconds", help="Seconds of a request; longer ones end (408).")]
MaxLag = Annotated[int, typer.Option("--max-lag", help="Tokens that a stream's reader may be behind before it is cut.")]
MaxMessages = Annotated[int, typer.Option("--max-messages", help="Messages of a request; more are refused (400).")]
MaxConnections = Annotated[int, typer.Option("--max-connections", help="Open connections; others wait.")]
HeaderSeconds = Annotated[float, typer.Option("--header-seconds", help="Seconds for the header of a request.")]
IdleSeconds = Annotated[float, typer.Option("--idle-seconds", help="Seconds of a connection between two requests.")]
GraceSeconds = Annotated[float, typer.Option("--grace-seconds", help="Seconds for running requests at the end.")]

# Of works that run by a recipe: None leaves the recipe's own value, or its default.
ModelOrRecipe = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE",
        help="Run folder, model folder, weights file or hub id; or a recipe, .json or .yaml.",
        show_default=False,
        parser=expanded,
    ),
]
ChangedOutput = Annotated[
    Path, typer.Option("--output", "-o", help="New folder for model, recipe and report.", parser=path)
]
CalibrationRows = Annotated[
    int | None, typer.Option("--calibration-rows", help="Rows of calibration text; 128 when absent.")
]
CalibrationTokens = Annotated[
    int | None, typer.Option("--calibration-tokens", help="Length of such a row (tokens); 512 when absent.")
]
CalibrationSeed = Annotated[
    int | None, typer.Option("--seed", help="Fixes the draw of calibration rows; 0 when absent.")
]
EvaluatedOn = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="FILE",
        help="What it cost: text for perplexity, labelled rows for a head.",
        parser=expanded,
    ),
]
RecipeDevice = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.")]
