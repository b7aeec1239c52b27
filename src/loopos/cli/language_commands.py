"""The commands for language models, and `evaluate` and `serve` for every kind of model: options and help texts."""

from __future__ import annotations

import typer

from loopos.cli import option_types as of

# Answers of a chat at temperature 0 tend to repeat themselves.
CHAT_TEMPERATURE = 0.7


def generate(
    model: of.LanguageModel,
    prompts: of.Prompts = None,
    source: of.Input = None,
    output: of.LinesFile = None,
    json: of.JsonLines = False,
    steps: of.Steps = False,
    samples: of.Completions = 1,
    strategy: of.Strategy = "single",
    reward_model: of.RankingModel = None,
    num_beams: of.NumBeams = None,
    temperature: of.Temperature = 0.0,
    top_k: of.TopK = 0,
    top_p: of.TopP = 1.0,
    min_p: of.MinP = 0.0,
    typical_p: of.TypicalP = 1.0,
    repetition_penalty: of.RepetitionPenalty = 1.0,
    presence_penalty: of.PresencePenalty = 0.0,
    frequency_penalty: of.FrequencyPenalty = 0.0,
    no_repeat_ngram: of.NoRepeatNgram = 0,
    max_new_tokens: of.MaxNewTokens = 256,
    stop: of.Stop = None,
    seed: of.Seed = 0,
    max_steps: of.MaxSteps = None,
    max_step_tokens: of.MaxStepTokens = None,
    min_thinking_tokens: of.MinThinkingTokens = 0,
    max_thinking_tokens: of.MaxThinkingTokens = None,
    raw: of.Raw = False,
    system: of.SystemText = None,
    columns: of.Columns = None,
    encoding: of.Encoding = None,
    device: of.Device = "auto",
    precision: of.Precision = "auto",
    trust_remote_code: of.TrustRemoteCode = False,
    verbose: of.Verbose = False,
) -> None:
    """Generate text from prompts, or solve problems in steps."""
    from loopos.cli import generate as command
    from loopos.cli.sampling_options import SamplingOptions, StepOptions

    sampling = SamplingOptions(
        temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty,
        no_repeat_ngram, max_new_tokens, tuple(stop or ()), seed,
    )  # fmt: skip
    limits = StepOptions(max_steps, max_step_tokens, min_thinking_tokens, max_thinking_tokens)
    options = command.GenerateOptions(
        prompts=tuple(prompts or ()), input=source, output=output, json=json, steps=steps, samples=samples, raw=raw,
        strategy=strategy, reward_model=reward_model, num_beams=num_beams, system=system,
        columns=tuple(columns or ()), encoding=encoding, sampling=sampling, limits=limits, device=device,
        precision=precision, trust_remote_code=trust_remote_code, verbose=verbose,
    )  # fmt: skip
    raise typer.Exit(command.run(model, options))


def chat(
    model: of.LanguageModel,
    system: of.SystemText = None,
    temperature: of.Temperature = CHAT_TEMPERATURE,
    top_k: of.TopK = 0,
    top_p: of.TopP = 1.0,
    min_p: of.MinP = 0.0,
    repetition_penalty: of.RepetitionPenalty = 1.0,
    max_new_tokens: of.MaxNewTokens = 512,
    stop: of.Stop = None,
    seed: of.Seed = 0,
    device: of.Device = "auto",
    precision: of.Precision = "auto",
    trust_remote_code: of.TrustRemoteCode = False,
    verbose: of.Verbose = False,
) -> None:
    """Chat with a language model; type /help for its commands."""
    from loopos.cli import chat as command
    from loopos.cli.sampling_options import SamplingOptions

    sampling = SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens, stop=tuple(stop or ()), seed=seed,
    )  # fmt: skip
    options = command.ChatOptions(
        system=system, device=device, precision=precision, trust_remote_code=trust_remote_code, verbose=verbose,
        sampling=sampling,
    )  # fmt: skip
    raise typer.Exit(command.run(model, options))


def evaluate(
    model: of.Model,
    source: of.Data = None,
    metrics: of.Metrics = None,
    strategy: of.Strategy = "single",
    samples: of.Chains = 1,
    pass_k: of.PassK = None,
    checker: of.Checker = "auto",
    temperature: of.Temperature = 0.0,
    top_k: of.TopK = 0,
    top_p: of.TopP = 1.0,
    max_new_tokens: of.MaxNewTokens = 256,
    seed: of.Seed = 0,
    max_steps: of.MaxSteps = None,
    max_step_tokens: of.MaxStepTokens = None,
    min_thinking_tokens: of.MinThinkingTokens = 0,
    max_thinking_tokens: of.MaxThinkingTokens = None,
    limit: of.Limit = None,
    window: of.Window = None,
    stride: of.Stride = None,
    tasks: of.Tasks = None,
    task_folder: of.TaskFolder = None,
    num_fewshot: of.NumFewshot = None,
    chat: of.Chat = False,
    output: of.RecordsFile = None,
    report: of.ReportFile = None,
    columns: of.Columns = None,
    encoding: of.Encoding = None,
    skip_bad_rows: of.SkipBadRows = False,
    device: of.Device = "auto",
    precision: of.Precision = "auto",
    json: of.Json = False,
    verbose: of.Verbose = False,
) -> None:
    """Evaluate a model on data or tasks: predictions, answers to problems, or language-model loss."""
    from loopos.cli import evaluate as command
    from loopos.cli.evaluate_language import LanguageOptions
    from loopos.cli.evaluate_tasks import TaskOptions
    from loopos.cli.sampling_options import SamplingOptions, StepOptions

    language = LanguageOptions(
        metrics=tuple(metrics or ()), strategy=strategy, samples=samples, pass_k=tuple(pass_k or ()), checker=checker,
        sampling=SamplingOptions(temperature, top_k, top_p, max_new_tokens=max_new_tokens, seed=seed),
        limits=StepOptions(max_steps, max_step_tokens, min_thinking_tokens, max_thinking_tokens),
        limit=limit, output=output, precision=precision, window=window, stride=stride,
    )  # fmt: skip
    of_tasks = TaskOptions(tuple(tasks or ()), task_folder, num_fewshot, chat)
    options = command.EvaluateOptions(
        columns=tuple(columns or ()), encoding=encoding, report=report, skip_bad_rows=skip_bad_rows, device=device,
        json=json, verbose=verbose, language=language, tasks=of_tasks,
    )  # fmt: skip
    raise typer.Exit(command.run(model, source, options))


def winrate(
    first: of.ModelA,
    second: of.ModelB,
    prompts: of.PromptsFile,
    judge: of.Judge,
    samples: of.Pairs = 1,
    temperature: of.Temperature = 0.0,
    top_k: of.TopK = 0,
    top_p: of.TopP = 1.0,
    max_new_tokens: of.MaxNewTokens = 256,
    stop: of.Stop = None,
    seed: of.Seed = 0,
    limit: of.Limit = None,
    output: of.PairsFile = None,
    raw: of.Raw = False,
    system: of.SystemText = None,
    columns: of.Columns = None,
    encoding: of.Encoding = None,
    device: of.Device = "auto",
    precision: of.Precision = "auto",
    trust_remote_code: of.TrustRemoteCode = False,
    json: of.Json = False,
    verbose: of.Verbose = False,
) -> None:
    """Compare the answers of two language models to the same prompts with a judge."""
    from loopos.cli import winrate as command
    from loopos.cli.sampling_options import SamplingOptions

    sampling = SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, stop=tuple(stop or ()),
        seed=seed,
    )  # fmt: skip
    options = command.WinRateOptions(
        judge=judge, samples=samples, limit=limit, output=output, raw=raw, system=system,
        columns=tuple(columns or ()), encoding=encoding, device=device, precision=precision,
        trust_remote_code=trust_remote_code, json=json, verbose=verbose, sampling=sampling,
    )  # fmt: skip
    raise typer.Exit(command.run(first, second, prompts, options))


def serve(
    model: of.ServedModel,
    host: of.Host = "127.0.0.1",
    port: of.Port = 8000,
    api_key: of.ApiKey = None,
    name: of.ServedName = None,
    max_rows: of.MaxRows = 16,
    max_context: of.MaxContext = 4096,
    max_tokens: of.MaxTokens = 1024,
    max_queue: of.MaxQueue = 128,
    max_body: of.MaxBody = 1 << 20,
    max_messages: of.MaxMessages = 1024,
    max_seconds: of.MaxSeconds = 300.0,
    max_lag: of.MaxLag = 1024,
    max_connections: of.MaxConnections = 512,
    header_seconds: of.HeaderSeconds = 10.0,
    idle_seconds: of.IdleSeconds = 30.0,
    grace_seconds: of.GraceSeconds = 30.0,
    device: of.Device = "auto",
    precision: of.Precision = "auto",
    trust_remote_code: of.TrustRemoteCode = False,
    verbose: of.Verbose = False,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API: chat, completions, embeddings, classification, scores."""
    from loopos.cli import serve as command
    from loopos.serving.limits import ServingLimits

    limits = ServingLimits(
        max_rows=max_rows, max_context=max_context, max_tokens=max_tokens, max_queue=max_queue, max_body=max_body,
        max_messages=max_messages, max_seconds=max_seconds, max_lag=max_lag, max_connections=max_connections,
        header_seconds=header_seconds, idle_seconds=idle_seconds, grace_seconds=grace_seconds,
    )  # fmt: skip
    options = command.ServeOptions(
        host=host, port=port, api_key=api_key, name=name, limits=limits, device=device, precision=precision,
        trust_remote_code=trust_remote_code, verbose=verbose,
    )  # fmt: skip
    raise typer.Exit(command.run(model, options))
