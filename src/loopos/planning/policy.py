"""The plan of a PPO run: prompts, iterations, parameters of every role, memory, disk and time.

Counts of prompts, steps and parameters are exact. The length of responses is unknown: each is assumed to be as long as
its limit allows. The plan lists what its time leaves out: sampling, reward functions and judges.
Letters: B responses of an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from loopos.config.ppo import PpoConfig
from loopos.planning import estimate
from loopos.planning.machine import Machine, free_bytes
from loopos.planning.shapes import Model, RoleShapes, role_shapes
from loopos.planning.work import PromptInputs, RewardShape
from loopos.rl.rollouts import RolloutPlan

# Maximum rows that the engine generates together.
_WRITTEN_TOGETHER = 64


@dataclass(frozen=True)
class Prompts:
    """Lengths of the training prompts and of the validation prompts (tokens); `summary`: what was decided,
    `tokens_summary`: the report on the training prompts.
    """

    train: list[int]
    validation: list[int]
    summary: list[str]
    tokens_summary: str
    architecture: PreTrainedConfig


@dataclass(frozen=True)
class Amounts:
    """The amount of work of a run, with every response at its maximum length. `prompt_tokens`, `response_tokens`: mean
    of an iteration, sum of a validation. `largest`: tokens of the largest forward pass of an update, `longest`: of one
    row. Of responses that share their prompt in a pass each has its own here: whether they do depends on the model.
    """

    iterations: int
    steps: int
    steps_an_iteration: int
    responses: int
    prompt_tokens: int
    response_tokens: int
    validations: int
    validation_prompts: int
    validation_prompt_tokens: int
    validation_response_tokens: int
    passes: float
    largest: int
    longest: int


def tokenized(inputs: PromptInputs) -> Prompts:
    """The prompts of a run as lengths. Raises `DataError`, as training does."""
    train, report = inputs.encoder.prompts(inputs.data.train)
    validation = inputs.encoder.prompts(inputs.validation)[0] if inputs.validation else []
    summary = [*inputs.data.summary, inputs.encoder.template.summary]
    return Prompts(list(map(len, train)), list(map(len, validation)), summary, report.summary(), inputs.architecture)


def plan_of(
    config: PpoConfig, prompts: Prompts, rewards: Sequence[RewardShape], machine: Machine, *, trust_remote_code: bool
) -> dict[str, Any]:
    """All figures, as one JSON object. Raises `UserError`, as training does."""
    shapes = role_shapes(config, prompts.architecture, rewards, trust_remote_code=trust_remote_code)
    amounts, trained = amounts_of(config, prompts), shapes.trained
    memory, disk = storage(config, shapes, amounts, machine)
    return {
        "model": {
            "name": shapes.policy.name,
            "parameters": trained.total,
            "trained": trained.trained,
            "frozen": trained.total - trained.trained,
            "trainable": config.training.trainable,
            "precision": machine.precision,
            "device": str(machine.device),
            "copies": shapes.copies,
            "roles": {
                name: {"parameters": role.parameters, "trained": role.trained, "is": role.summary}
                for name, role in shapes.roles.items()
            },
        },
        "data": {"said": prompts.summary},
        "prompts": {
            "train": len(prompts.train),
            "validation": len(prompts.validation),
            "iteration": amounts.responses,
            "said": prompts.tokens_summary,
        },
        "iterations": amounts.iterations,
        "tokens": {
            "prompts": sum(prompts.train),
            "response": config.longest_response,
            "iteration": amounts.prompt_tokens + amounts.response_tokens,
            "trained": round(amounts.passes * (amounts.prompt_tokens + amounts.response_tokens)),
            "largest_forward": amounts.largest,
        },
        "steps": {"iteration": amounts.steps_an_iteration, "all": amounts.steps},
        "memory": {**memory, "peak": sum(memory.values()), "there": machine.memory},
        "disk": {**disk, "all": disk["checkpoints"] + disk["model"], "free": free_bytes(config.data.output_dir)},
        "time": time_of(config, shapes, amounts, machine),
    }


def amounts_of(config: PpoConfig, prompts: Prompts) -> Amounts:
    """Iterations, steps and tokens of one process."""
    training, longest_response = config.training, config.longest_response
    each = config.generation.responses_per_prompt
    plan = RolloutPlan.of(training, num_prompts=len(prompts.train), rank=0, world=1, responses_per_prompt=each)
    steps_an_iteration = plan.inner_epochs * plan.minibatches
    planned = plan.iterations * steps_an_iteration
    steps = planned if training.max_steps is None else min(planned, training.max_steps)
    iterations = -(-steps // steps_an_iteration)
    validations = 0
    if prompts.validation and training.validate_every != "never":
        # Before the first step, then every `validate_every` iterations, and at the end.
        validations = int(training.validate_at_start) + -(-iterations // training.validate_every)
    rows = -(-plan.batch_size // (plan.minibatches * plan.accumulation))
    by_length = sorted(prompts.train, reverse=True)
    return Amounts(
        iterations=iterations,
        steps=steps,
        steps_an_iteration=steps_an_iteration,
        responses=plan.batch_size,
        prompt_tokens=round(plan.batch_size * sum(prompts.train) / len(prompts.train)),
        response_tokens=plan.batch_size * longest_response,
        validations=validations,
        validation_prompts=len(prompts.validation) * config.evaluation.responses,
        validation_prompt_tokens=sum(prompts.validation) * config.evaluation.responses,
        validation_response_tokens=len(prompts.validation) * config.evaluation.responses * longest_response,
        passes=steps / plan.minibatches,
        largest=sum(by_length[index % len(by_length)] + longest_response for index in range(rows)),
        longest=max(prompts.train + prompts.validation) + longest_response,
    )


def storage(
    config: PpoConfig, shapes: RoleShapes, amounts: Amounts, machine: Machine
) -> tuple[dict[str, int], dict[str, int]]:
    """Memory and disk by part (bytes). `loading`: what all copies in fp32, as they are read, take beyond the rest."""
    training, policy, half = config.training, shapes.policy, machine.half_weights
    number_bytes = 2 if half else 4
    state = estimate.optimizer_bytes(training.optimizer, training.momentum, shapes.trained)
    has_best = training.keep_best and amounts.validations > 0
    activations = sum(
        estimate.activation_bytes(
            model.shape,
            tokens=amounts.largest,
            longest=amounts.longest,
            number_bytes=machine.activation_number_bytes,
            recomputes=training.gradient_checkpointing,
        )
        for model in (policy, shapes.critic)
        if model is not None
    )
    memory = estimate.memory_bytes(
        process=machine.process,
        parameters=shapes.trained,
        half_precision=half,
        optimizer_state=state,
        activations=activations,
        reloads_best=has_best,
        merges=False,
    )
    if training.trainable == "lora" and half:
        # Only the policy is exported: its weights are converted from 2 to 4 bytes.
        memory["export"] += 2 * policy.parameters.total
    cache = estimate.cache_bytes(
        policy.shape,
        layers=policy.num_layers,
        rows=written_together(max(amounts.responses, amounts.validation_prompts)),
        columns=amounts.longest,
        number_bytes=number_bytes,
    )
    memory["buffers"] = max(memory["buffers"], cache)
    memory["logits"] = estimate.logit_bytes(
        width=policy.shape.width,
        vocabulary=policy.vocabulary,
        number_bytes=number_bytes,
        trains_output=policy.trains_output,
    )
    memory["loading"] = max(0, machine.process + 4 * shapes.trained.total - sum(memory.values()))
    disk = estimate.disk_bytes(
        shapes.trained,
        half_precision=half,
        optimizer_state=state,
        checkpoints=training.keep_last + int(has_best) + 1,
    )
    return memory, {**disk, "model": number_bytes * policy.parameters.total}


def written_together(responses: int) -> int:
    """Rows of `responses` responses that the engine generates together."""
    return min(_WRITTEN_TOGETHER, responses)


def time_of(config: PpoConfig, shapes: RoleShapes, amounts: Amounts, machine: Machine) -> dict[str, Any]:
    """Seconds of generating responses, of the passes that score them, and of the updates; and what they leave out."""
    rates = {"operations_a_second": machine.operations_a_second, "bytes_a_second": machine.bytes_a_second}
    policy = shapes.policy

    def writing(responses: int, prompt_tokens: int) -> float:
        return estimate.generation_seconds(
            policy.parameters,
            responses=responses,
            new_tokens=config.longest_response,
            prompt_tokens=prompt_tokens,
            together=_WRITTEN_TOGETHER,
            output=policy.output,
            number_bytes=2 if machine.half_weights else 4,
            operations_a_second=machine.operations_a_second,
            bytes_a_second=machine.bytes_a_second,
        )

    written = amounts.iterations * writing(amounts.responses, amounts.prompt_tokens)
    if amounts.validations:
        written += amounts.validations * writing(amounts.validation_prompts, amounts.validation_prompt_tokens)
    responses = amounts.iterations * amounts.response_tokens + amounts.validations * amounts.validation_response_tokens
    prompts = amounts.iterations * amounts.prompt_tokens + amounts.validations * amounts.validation_prompt_tokens
    # Policy and reference process the same tokens; the reference may share the policy's weights.
    references = [policy] if "reference" in shapes.roles else []
    scorers = [policy, *references, *shapes.rewards, *([shapes.critic] if shapes.critic is not None else [])]
    scored = sum(_forward(model, prompts + responses, responses, machine) for model in scorers)
    updated = sum(_updates(config, model, amounts, machine) for model in (policy, shapes.critic) if model is not None)
    left_out = ["sampling and attention to generated tokens"]
    left_out += ["the reward functions"] if config.reward.functions else []
    left_out += ["groups that dynamic sampling draws in addition"] if config.training.dynamic_sampling else []
    left_out += ["the judge"] if config.evaluation.judge is not None and amounts.validations else []
    left_out += ["the responses of evaluation.best_of"] if config.evaluation.best_of and amounts.validations else []
    parts = {"generation": written, "scoring": scored, "updates": updated}
    return {"seconds": sum(parts.values()), **parts, "left_out": left_out, **rates}


def _forward(model: Model, tokens: int, targets: int, machine: Machine) -> float:
    return estimate.training_seconds(
        model.parameters,
        tokens=0,
        validation_tokens=tokens,
        steps=0,
        optimizer_state=0,
        backward_fraction=0.0,
        operations_a_second=machine.operations_a_second,
        bytes_a_second=machine.bytes_a_second,
        output=model.output,
        validation_targets=targets,
    )


def _updates(config: PpoConfig, model: Model, amounts: Amounts, machine: Machine) -> float:
    training = config.training
    return estimate.training_seconds(
        model.parameters,
        tokens=round(amounts.passes * (amounts.prompt_tokens + amounts.response_tokens)),
        validation_tokens=0,
        steps=amounts.steps,
        optimizer_state=estimate.optimizer_bytes(training.optimizer, training.momentum, model.parameters),
        backward_fraction=model.shape.layers / model.num_layers,
        operations_a_second=machine.operations_a_second,
        bytes_a_second=machine.bytes_a_second,
        output=model.output,
        targets=round(amounts.passes * amounts.response_tokens),
        trains_output=model.trains_output,
    )
