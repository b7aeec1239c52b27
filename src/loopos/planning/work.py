"""The data of a run of any method, opened without weights: rows, tokenizer, tokens, architecture.

The code is that of the methods themselves, so that counts of rows, tokens and steps are exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.config.diagnostics import UserError
from loopos.config.distillation import DistillationConfig
from loopos.config.fine_tuning import FineTuningConfig
from loopos.config.methods import method_row
from loopos.config.ppo import PpoConfig
from loopos.config.preference import PreferenceConfig
from loopos.config.pretraining import PretrainingConfig
from loopos.config.reward_model import RewardModelConfig
from loopos.config.sections import LoraSection
from loopos.config.sft import SftConfig
from loopos.data.labeled import LabeledData, load_labeled
from loopos.data.preference_data import (
    PreferenceData,
    has_step_labels,
    load_comparisons,
    load_judgments,
    load_prompts_to_compare,
    load_thumbs,
)
from loopos.data.preference_tokens import EncodedComparison, PreferenceEncoder
from loopos.data.preferences import Comparison, Pair
from loopos.data.prompts import Prompt, distinct_prompts
from loopos.data.reading import DataReport
from loopos.data.stored_logprobs import encoder_of
from loopos.data.supervised import SupervisedData, load_supervised
from loopos.data.supervised_tokens import SupervisedEncoder
from loopos.data.tokens import Encoded, encode_labeled, longest
from loopos.methods.pretraining import Pretrainer
from loopos.methods.reward_rows import StepLabels
from loopos.models.attention import prompt_runs_once
from loopos.models.folders import check_same_tokens
from loopos.models.load import Sizes, load_config, new_config
from loopos.models.new_tokens import add_tokens
from loopos.models.resolve import resolve, resolve_trained
from loopos.models.tokenizers import open_tokenizer
from loopos.rl.environments import EnvironmentClass
from loopos.rl.tasks import load_policy_prompts
from loopos.training.precision import pick_device
from loopos.training.progress import RunProgress


@dataclass(frozen=True)
class Inputs:
    """Rows and their tokens; `max_length`: where examples are cut (tokens)."""

    data: LabeledData
    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig
    max_length: int | None
    train: list[Encoded]
    train_report: DataReport
    validation: list[Encoded]
    validation_report: DataReport


def open_inputs(config: FineTuningConfig, *, trust_remote_code: bool) -> Inputs:
    """Reads and tokenizes the config's data. Raises `UserError`, as training does."""
    section = config.data
    data = load_labeled(section, config.model, seed=config.training.seed)
    architecture, tokenizer, max_length = _opened(config, trust_remote_code)
    train, train_report = encode_labeled(
        tokenizer, data.train, max_length=max_length, on_truncation=section.on_truncation
    )
    validation, validation_report = encode_labeled(
        tokenizer, data.validation, max_length=max_length, on_truncation=section.on_truncation
    )
    return Inputs(data, tokenizer, architecture, max_length, train, train_report, validation, validation_report)


@dataclass(frozen=True)
class ComparisonInputs:
    """Comparisons, their encoder, and the architecture that reads them. `thumbs`: of answers with a thumb, whether each
    of a training row is desirable; None for comparisons.
    """

    data: PreferenceData[Comparison]
    encoder: PreferenceEncoder
    architecture: PreTrainedConfig
    thumbs: list[tuple[bool, ...]] | None = None


@dataclass(frozen=True)
class StepwiseInputs:
    """Answers with step labels, what encodes them, and the architecture that reads them."""

    data: PreferenceData[Any]
    encoder: PreferenceEncoder
    rows: StepLabels
    architecture: PreTrainedConfig


@dataclass(frozen=True)
class PromptInputs:
    """Prompts, the validation prompts, their encoder, and the policy's architecture."""

    data: PreferenceData[Prompt]
    validation: list[Prompt]
    encoder: PreferenceEncoder
    architecture: PreTrainedConfig


@dataclass(frozen=True)
class RewardShape:
    """A reward model's architecture and heads. `adapter`: its adapters, if it is one over the policy's weights."""

    architecture: PreTrainedConfig
    heads: int
    adapter: LoraSection | None


def open_comparisons(config: Any, *, trust_remote_code: bool) -> ComparisonInputs | StepwiseInputs:
    """The comparisons of a config, its answers with a thumb, or those with step labels, not tokenized yet. Raises
    `UserError`, as training does.
    """
    reads, by_prompts = method_row(config.computation.method).reads, getattr(config.data, "prompts", None) is not None
    has_thumbs = "thumbs" in reads
    load: Any = load_prompts_to_compare if by_prompts else load_comparisons
    if "judgments" in reads:
        load = load_judgments
    elif has_thumbs:
        load = load_thumbs
    data: PreferenceData[Any] = load(config.data, config.data.source, seed=config.training.seed)
    thumbs = [each.desirable for each in data.train] if has_thumbs else None
    if has_thumbs:
        train, validation = ([each.comparison for each in rows] for rows in (data.train, data.validation))
        data = replace(data, train=train, validation=validation)
    architecture, tokenizer, max_length = _opened(config, trust_remote_code)
    encoder = PreferenceEncoder(config.data, tokenizer, max_length=max_length)
    if has_step_labels(data):
        return StepwiseInputs(data, encoder, StepLabels(config, encoder, torch.device("cpu")), architecture)
    return ComparisonInputs(data, encoder, architecture, thumbs)


def open_prompts(config: PpoConfig, *, trust_remote_code: bool) -> PromptInputs:
    """The prompts of a config, not tokenized yet. Raises `UserError`, as training does."""
    section = config.data
    environment = None if config.environment is None else EnvironmentClass(config.environment.name)
    data = load_policy_prompts(config, environment)
    architecture, tokenizer, whole = _opened(config, trust_remote_code)
    room = None if whole is None else whole - config.longest_response
    limit = min((each for each in (room, section.max_prompt_tokens) if each is not None), default=None)
    encoder = PreferenceEncoder(section, tokenizer, max_length=limit)
    validation = data.validation[: config.evaluation.prompts] if config.validates else []
    return PromptInputs(data, validation, encoder, architecture)


def _opened(config: Any, trust_remote_code: bool) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, int | None]:
    """Architecture, tokenizer, and the maximum sequence length."""
    section, max_length = config.data, config.training.max_length
    sizes, weights = Sizes.of(config.model, max_length=max_length), resolve(section.pretrained_weights)
    architecture = load_config(weights, sizes=sizes, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(weights, section.tokenizer, trust_remote_code=trust_remote_code)
    add_tokens(tokenizer, getattr(section, "new_tokens", []), getattr(section, "new_special_tokens", []))
    text = architecture.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    return architecture, tokenizer, longest(tokenizer, positions, max_length)


def trained_reward_shapes(
    config: PpoConfig | PreferenceConfig, tokenizer: PreTrainedTokenizerBase
) -> list[RewardShape]:
    """The shapes of a config's reward models. An adapter is assumed to be over the policy's weights if the names of the
    weights match: training compares the weights themselves. Raises `UserError`.
    """
    policy, found = Path(config.data.pretrained_weights.rstrip("/")).name, []
    for location in config.data.reward_models:
        model = resolve_trained(location)
        check_same_tokens(tokenizer, open_tokenizer(model), f"data.reward_model: {location}")
        over_policy = model.adapter is not None and model.description.get("pretrained_weights") == policy
        lora = _adapter(model.adapter) if model.adapter is not None and over_policy else None
        found.append(RewardShape(load_config(model), len(model.description["score_mean"]), lora))
    return found


def open_teacher(config: DistillationConfig) -> PreTrainedConfig | None:
    """The teacher's architecture; None where rows hold its log-probabilities. Raises `UserError`, also for a tokenizer
    that is not the student's.
    """
    location = config.data.teacher
    if location is None:
        return None
    student = open_tokenizer(resolve(config.data.pretrained_weights), config.data.tokenizer)
    check_same_tokens(student, open_tokenizer(resolve(location)), f"data.teacher: {location}", of="student")
    return load_config(resolve(location))


def open_reward_shapes(config: PreferenceConfig) -> list[RewardShape]:
    """The shapes of the reward models that compare a policy's own answers. Raises `UserError`."""
    tokenizer = open_tokenizer(resolve(config.data.pretrained_weights), config.data.tokenizer)
    return trained_reward_shapes(config, tokenizer)


def planned_reward_shape(config: RewardModelConfig, architecture: PreTrainedConfig) -> RewardShape:
    """The shape of the reward model that an earlier phase will train."""
    training = config.training
    lora = training.lora or LoraSection() if training.trainable == "lora" else None
    return RewardShape(architecture, config.reward.heads, lora)


def _adapter(folder: Path) -> LoraSection:
    """The adapters that a PEFT folder describes."""
    file = folder / "adapter_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return LoraSection(rank=found["r"], target_modules=sorted(found["target_modules"]))
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise UserError(f"{file}: not a readable adapter: {problem}") from problem


AnyConfig: TypeAlias = FineTuningConfig | SftConfig | PretrainingConfig | RewardModelConfig | PreferenceConfig
"""The configs of methods that train on rows of a data set; PPO, which generates its own, is in `policy`."""


@dataclass(frozen=True)
class Work:
    """`head`: outputs of the head, None for a language model; `trainings`: how often training on the rows starts anew;
    `summary` and `tokens_summary`: what was read and decided. `final_tokens`: tokens of the forward passes after
    training; `row_facts`: counts of the rows by name; `longest`: maximum tokens that one token attends to, None for
    those of the longest row.
    """

    architecture: PreTrainedConfig
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    summary: list[str]
    tokens_summary: str
    tokens_cut: int
    head: int | None
    trainings: int = 1
    final_tokens: int = 0
    row_facts: dict[str, int] = field(default_factory=dict)
    longest: int | None = None


@dataclass(frozen=True)
class SupervisedInputs:
    """The examples of supervised fine-tuning, their encoder, and the architecture."""

    data: SupervisedData
    encoder: SupervisedEncoder
    architecture: PreTrainedConfig


def work_of(config: Any, *, trust_remote_code: bool) -> Work:
    """Reads and tokenizes the config's data, by the kind of rows that its method reads. Raises `UserError`, as training
    does, and for a method that does not say what it reads.
    """
    readers: Mapping[str, Callable[..., Work]] = {
        "labeled": _labeled_work,
        "text": _text_work,
        "comparisons": _comparison_work,
        "judgments": _comparison_work,
        "thumbs": _comparison_work,
        "demonstrations": _supervised_work,
    }
    name = config.computation.method
    reads = method_row(name).reads
    if not reads or reads[0] not in readers:
        raise UserError(f'the method "{name}" does not say what it reads, so that its run cannot be planned')
    return readers[reads[0]](config, trust_remote_code=trust_remote_code)


def _labeled_work(config: FineTuningConfig, *, trust_remote_code: bool) -> Work:
    inputs = open_inputs(config, trust_remote_code=trust_remote_code)
    report = inputs.train_report
    return Work(
        inputs.architecture,
        inputs.train,
        inputs.validation,
        inputs.data.summary,
        report.summary(),
        report.tokens_cut,
        inputs.data.space.num_outputs,
    )


def _text_work(config: PretrainingConfig, *, trust_remote_code: bool) -> Work:
    pretrainer = open_pretraining(config, trust_remote_code=trust_remote_code)
    architecture = new_config(Sizes.of(config.model, max_length=pretrainer.max_length))
    tokens = sum(len(chunk.ids) for chunk in pretrainer.pieces)
    summary = f"{len(pretrainer.pieces):,} chunks, {tokens:,} tokens; none cut"
    return Work(architecture, pretrainer.pieces, pretrainer.validation_pieces, ["text"], summary, 0, None)


def _supervised_work(config: SftConfig, *, trust_remote_code: bool) -> Work:
    inputs = open_supervised(config, trust_remote_code=trust_remote_code)
    train, report = inputs.encoder(inputs.data.train)
    validation: list[Encoded] = []
    if config.validates and inputs.data.validation:
        validation = [row.encoded() for row in inputs.encoder(inputs.data.validation)[0]]
    improvement = config.self_improvement if isinstance(config, ChainOfThoughtConfig) else None
    rounds = improvement.rounds if improvement is not None else 0
    summary = [*inputs.data.summary, inputs.encoder.template.summary]
    if rounds:
        summary.append(f"{rounds} rounds of self-improvement: each trains anew, on these rows and the chains found")
    return Work(
        inputs.architecture,
        [row.encoded() for row in train],
        validation,
        summary,
        report.summary(),
        report.tokens_cut,
        None,
        rounds + 1,
    )


def _stepwise_work(config: RewardModelConfig, inputs: StepwiseInputs) -> Work:
    """Of a process reward model."""
    train, report = inputs.rows.encode(inputs.data.train)
    validation: list[Any] = []
    if config.validates and inputs.data.validation:
        validation, _ = inputs.rows.encode(inputs.data.validation)
    return Work(
        inputs.architecture,
        [Encoded(row.ids, None, row.index) for row in train],
        [Encoded(row.ids, None, row.index) for row in validation],
        [*inputs.data.summary, inputs.encoder.template.summary],
        report.summary(),
        report.tokens_cut,
        config.reward.heads,
        final_tokens=sum(len(row.ids) for row in validation),
        row_facts={"steps": report.steps or 0, "labeled_steps": report.labeled_steps or 0},
    )


def _comparison_work(config: Any, *, trust_remote_code: bool) -> Work:
    """Of a reward model, or of a language model that learns from comparisons."""
    inputs = open_comparisons(config, trust_remote_code=trust_remote_code)
    if isinstance(inputs, StepwiseInputs):
        return _stepwise_work(config, inputs)
    if (online := getattr(config, "online", None)) is not None:
        # The policy's own answers, of the maximum length.
        encoder = inputs.encoder.leaving_room(online.max_new_tokens)
        prompts, report = encoder.prompts(distinct_prompts(inputs.data.train))
        answers = [[0] * online.max_new_tokens] * 2
        examples = [EncodedComparison(ids, answers, (Pair(0, 1),), index) for index, ids in enumerate(prompts)]
        report.lengths = [len(ids) + online.max_new_tokens for ids in prompts]
        report.responses, report.pairs = 2 * len(examples), len(examples)
    else:
        examples, report = inputs.encoder.comparisons(inputs.data.train)
    validation_pairs: list[EncodedComparison] = []
    if config.validates and inputs.data.validation:
        validation_pairs, _ = inputs.encoder.comparisons(inputs.data.validation)
    on_cpu = pick_device(config.training.device).type == "cpu" and config.model.attention != "padded"
    train, validation = _rows(examples, on_cpu=on_cpu), _rows(validation_pairs, on_cpu=on_cpu)
    heads, final_tokens = None, 0
    if method_row(config.computation.method).trains == "scores":
        # Before export training responses are scored for normalization, then the validation responses for the report.
        heads, scored = config.reward.heads, [*(train if config.reward.normalize else []), *validation]
        final_tokens = sum(len(row.ids) for row in scored)
    return Work(
        inputs.architecture,
        train,
        validation,
        [*inputs.data.summary, inputs.encoder.template.summary],
        report.summary(),
        report.tokens_cut,
        heads,
        final_tokens=final_tokens,
        row_facts={"responses": report.responses or 0, "pairs": report.pairs or 0},
        longest=max(report.lengths or ()),
    )


def _rows(examples: Sequence[EncodedComparison], *, on_cpu: bool) -> list[Encoded]:
    """Comparisons as the tokens of a forward pass: on CPU a prompt once for all its responses, unless one is so long
    that the fused kernel is used.
    """
    shares_prompts = prompt_runs_once((each.num_tokens for each in examples), on_cpu=on_cpu)
    found = []
    for each in examples:
        once = [*each.prompt, *(token for response in each.responses for token in response)]
        anew = [token for response in each.responses for token in (*each.prompt, *response)]
        found.append(Encoded(once if shares_prompts else anew, None, each.index))
    return found


def open_supervised(config: SftConfig, *, trust_remote_code: bool) -> SupervisedInputs:
    """The examples of a supervised config, not tokenized yet. Raises `UserError`, as training does."""
    section = config.data
    data = load_supervised(section, seed=config.training.seed)
    architecture, tokenizer, max_length = _opened(config, trust_remote_code)
    encoder = encoder_of(section, data.step_format, tokenizer, max_length=max_length)
    return SupervisedInputs(data, encoder, architecture)


def open_pretraining(config: PretrainingConfig, *, trust_remote_code: bool) -> Pretrainer:
    """Pretraining with its documents read, its tokenizer trained and its chunks cut; notes go to standard error."""
    pretrainer = Pretrainer(config, progress=RunProgress(), trust_remote_code=trust_remote_code)
    pretrainer.load_data()
    return pretrainer
