"""`loopos train --dry-run`: what a run would need, without starting or writing anything.

Counts of parameters, rows, tokens and steps are exact; memory, disk and time are estimates (formulas: `estimate`). The
model is built on the "meta" device, as shapes without numbers; the two rates of the time estimate are measured for
about a second. Several processes and the time of generated answers are not covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loopos.config.distillation import DistillationConfig
from loopos.config.figures import as_bytes, as_time
from loopos.config.methods import method_row
from loopos.config.preference import PreferenceConfig
from loopos.config.sections import TrainingSection
from loopos.data.batches import Batch, Cursor, PackedRows, StepBatches
from loopos.data.tokens import Encoded
from loopos.planning import estimate
from loopos.planning import policy as policy_plan
from loopos.planning.machine import Machine, free_bytes, measured_rates
from loopos.planning.shapes import Model, meta_model
from loopos.planning.work import (
    AnyConfig,
    Work,
    open_prompts,
    open_reward_shapes,
    open_teacher,
    planned_reward_shape,
    trained_reward_shapes,
    work_of,
)
from loopos.rl import distillation_rounds, preference_rounds
from loopos.training.precision import pick_device, resolve


def described(plan: Mapping[str, Any]) -> str:
    """The plan of one run, or of the two phases of rlhf."""
    if "policy" in plan:
        phases = (("phase 1 of 2: reward model", plan["reward_model"]), ("phase 2 of 2: policy", plan["policy"]))
        return "\n\n".join(f"{title}\n{described(phase)}" for title, phase in phases)
    return _aligned(_policy(plan) if "iterations" in plan else _offline(plan))


def fits(plan: Mapping[str, Any]) -> bool:
    """Whether memory and disk have room for the run, or for both phases of rlhf."""
    if "policy" in plan:
        return fits(plan["reward_model"]) and fits(plan["policy"])
    return not _lacking(plan)


def _lacking(plan: Mapping[str, Any]) -> list[str]:
    """Resources that a run needs more of than available, with the missing amount."""
    memory, disk = plan["memory"], plan["disk"]
    short = {"memory": memory["peak"] - memory["there"], "disk": disk["all"] - disk["free"]}
    return [f"{as_bytes(missing)} more {name}" for name, missing in short.items() if missing > 0]


def _verdict(plan: Mapping[str, Any]) -> str:
    lacking = _lacking(plan)
    if not lacking:
        return "fits"
    return (
        f"does not fit: needs {' and '.join(lacking)}\n{'':10}lower training.batch_size (and raise "
        f"training.gradient_accumulation), lower training.max_length,\n{'':10}or set "
        "training.gradient_checkpointing=true or training.trainable=lora"
    )


def _aligned(lines: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<8}  {text}" for name, text in lines.items())


def _offline(plan: Mapping[str, Any]) -> dict[str, str]:
    model, rows, tokens, steps = (plan[name] for name in ("model", "rows", "tokens", "steps"))
    with_head = "" if "learned" in tokens else " with its head"
    learned = f"{tokens['learned']:,} per epoch learned; " if "learned" in tokens else ""
    times = f", {steps['trainings']} trainings" if steps.get("trainings", 1) > 1 else ""
    compared = ""
    if "pairs" in rows:
        compared = f"; comparisons, those to train on with {rows['responses']:,} responses in {rows['pairs']:,} pairs"
    return {
        "model": f"{model['name']}{with_head}, {model['parameters']:,} parameters",
        "trains": _trains(model),
        "data": "; ".join(plan["data"]["said"]),
        "rows": f"{rows['train']:,} train, {rows['validation']:,} validation{compared}",
        "tokens": f"{tokens['epoch']:,} per epoch, {tokens['all']:,} total; {learned}{tokens['said']}",
        "steps": f"{steps['epoch']:,} per epoch, {steps['all']:,} total{times}; "
        f"at most {tokens['largest_forward']:,} tokens in one forward pass",
        **_cost(plan),
    }


def _policy(plan: Mapping[str, Any]) -> dict[str, str]:
    model, prompts, tokens, steps = (plan[name] for name in ("model", "prompts", "tokens", "steps"))
    copies = f"{model['copies']} {'copy' if model['copies'] == 1 else 'copies'} of the weights"
    roles = [f"{name}: {role['is']}, {role['parameters']:,}" for name, role in model["roles"].items()]
    served = "1 role" if len(roles) == 1 else f"{len(roles)} roles"
    return {
        "model": f"{model['name']}, {copies} for {served}, {model['parameters']:,} parameters",
        "roles": f"\n{'':10}".join(roles),
        "trains": _trains(model),
        "data": "; ".join(plan["data"]["said"]),
        "prompts": f"{prompts['train']:,} train, {prompts['validation']:,} validation; {prompts['said']}",
        "tokens": f"with responses of the maximum length, {tokens['response']:,} tokens: about {tokens['iteration']:,} "
        f"per iteration, {tokens['trained']:,} trained on in total",
        "steps": f"{plan['iterations']:,} iterations of {prompts['iteration']:,} responses, "
        f"{steps['iteration']:,} optimizer steps each, {steps['all']:,} total; "
        f"at most {tokens['largest_forward']:,} tokens in one forward pass",
        **_cost(plan),
    }


def _trains(model: Mapping[str, Any]) -> str:
    fraction = f"{model['trained'] / model['parameters']:.1%}"
    return (
        f"{model['trained']:,} ({model['trainable']}, {fraction}), frozen {model['frozen']:,}; "
        f"{model['precision']} on {model['device']}"
    )


def _cost(plan: Mapping[str, Any]) -> dict[str, str]:
    memory, disk, spent = (plan[name] for name in ("memory", "disk", "time"))
    parts = " + ".join(f"{name} {as_bytes(size)}" for name, size in memory.items() if name not in ("peak", "there"))
    named = [(name, spent[name]) for name in ("generation", "scoring", "updates") if name in spent]
    of_parts = f" ({' + '.join(f'{name} {as_time(seconds)}' for name, seconds in named)})" if named else ""
    left_out = "".join(f", {each}" for each in spent.get("left_out", ()))
    return {
        "memory": f"about {as_bytes(memory['peak'])} at the peak, of {as_bytes(memory['there'])}\n{'':10}({parts})",
        "disk": f"about {as_bytes(disk['all'])} at most (a checkpoint {as_bytes(disk['checkpoint'])}, the model "
        f"{as_bytes(disk['model'])}); {as_bytes(disk['free'])} free",
        "time": f"about {as_time(spent['seconds'])} of training{of_parts}, without loading and saving{left_out} "
        f"(measured now: {spent['operations_a_second'] / 1e9:,.0f} GFLOP/s, {spent['bytes_a_second'] / 1e9:.0f} GB/s)",
        "verdict": _verdict(plan),
    }


DOES_NOT_FIT = 3
"""The exit code of a run that needs more memory or disk than available."""
# Enough steps of the first epoch to include its largest batch, or one of similar size.
_MOST_STEPS_LOOKED_AT = 2000
# Problems that validation answers together.
_GENERATED_TOGETHER = 64


def plan_of(config: Any, *, trust_remote_code: bool) -> dict[str, Any]:
    """All figures of the dry run, as one JSON object; for rlhf one for each phase, "reward_model" and "policy". Raises
    `UserError`, as the run would.
    """
    # Before the rows are read.
    resolve(config.training.precision, pick_device(config.training.device))
    if len(config.phases) > 1:
        first = plan_of(config.phases[0], trust_remote_code=trust_remote_code)
        return {"reward_model": first, "policy": _policy_plan(config, trust_remote_code=trust_remote_code)}
    if method_row(config.computation.method).trains == "roles":
        return _policy_plan(config, trust_remote_code=trust_remote_code)
    return _offline_plan(config, trust_remote_code=trust_remote_code)


def machine_of(training: TrainingSection) -> Machine:
    """The machine that training would use; call after the data is read, which then occupies memory. Raises
    `UserError`.
    """
    device = pick_device(training.device)
    precision = resolve(training.precision, device)
    return Machine.now(device, precision, measured_rates(device, half=precision != "fp32"))


def _policy_plan(config: Any, *, trust_remote_code: bool) -> dict[str, Any]:
    *earlier, ppo = config.phases
    inputs = open_prompts(ppo, trust_remote_code=trust_remote_code)
    # The reward model of an earlier phase is not there yet.
    rewards = [planned_reward_shape(phase, inputs.architecture) for phase in earlier]
    rewards = rewards or trained_reward_shapes(ppo, inputs.encoder.tokenizer)
    prompts = policy_plan.tokenized(inputs)
    machine = machine_of(ppo.training)
    return policy_plan.plan_of(ppo, prompts, rewards, machine, trust_remote_code=trust_remote_code)


def _offline_plan(config: AnyConfig, *, trust_remote_code: bool) -> dict[str, Any]:
    training = config.training
    work = work_of(config, trust_remote_code=trust_remote_code)
    machine = machine_of(training)
    model = meta_model(training, work.architecture, head=work.head, trust_remote_code=trust_remote_code)
    batches = StepBatches.of(training, PackedRows(work.train, None, machine.device), rank=0, world=1)
    planned = training.num_epochs * batches.steps_an_epoch
    left_out = {}
    if isinstance(config, PreferenceConfig) and config.online is not None:
        rounds = preference_rounds.plan_of(config, num_prompts=len(work.train), rank=0, world=1)
        planned, left_out = rounds.iterations * rounds.minibatches, {"left_out": ["writing and scoring answers"]}
    if isinstance(config, DistillationConfig) and config.is_on_policy:
        rounds = distillation_rounds.plan_of(config, num_rows=len(work.train), rank=0, world=1)
        planned, left_out = rounds.iterations * rounds.minibatches, {"left_out": ["writing answers"]}
    steps = planned if training.max_steps is None else min(planned, training.max_steps)
    epochs = steps / batches.steps_an_epoch
    largest, longest = largest_batch(batches)
    memory, disk = storage(config, model, work, machine, largest=largest, longest=work.longest or longest)
    validations = count_validations(config, steps, batches.steps_an_epoch) if work.validation else 0
    seconds = work.trainings * estimate.training_seconds(
        model.parameters,
        tokens=round(count_tokens(work.train) * epochs),
        validation_tokens=validations * count_tokens(work.validation) + work.final_tokens,
        steps=steps,
        optimizer_state=estimate.optimizer_bytes(training.optimizer, training.momentum, model.parameters),
        backward_fraction=model.shape.layers / model.num_layers,
        operations_a_second=machine.operations_a_second,
        bytes_a_second=machine.bytes_a_second,
        output=model.output,
        targets=round(count_targets(work.train) * epochs),
        validation_targets=validations * count_targets(work.validation),
        trains_output=model.trains_output,
    )
    if isinstance(config, DistillationConfig) and (teacher := teacher_model(config)) is not None:
        tokens = round(count_tokens(work.train) * epochs) + validations * count_tokens(work.validation)
        targets = round(count_targets(work.train) * epochs) + validations * count_targets(work.validation)
        seconds += estimate.forward_seconds(
            teacher.parameters, tokens=tokens, targets=targets, output=teacher.output,
            operations_a_second=machine.operations_a_second,
        )  # fmt: skip
    return {
        "model": model_facts(config, model, machine),
        "data": {"said": work.summary},
        "rows": {"train": len(work.train), "validation": len(work.validation), **work.row_facts},
        "tokens": token_facts(work, epochs, largest),
        "steps": {
            "epoch": batches.steps_an_epoch,
            "all": steps,
            **({} if work.head is not None else {"trainings": work.trainings}),
        },
        "memory": {**memory, "peak": sum(memory.values()), "there": machine.memory},
        "disk": {**disk, "all": disk["checkpoints"] + disk["model"], "free": free_bytes(config.data.output_dir)},
        "time": {
            "seconds": seconds,
            "operations_a_second": machine.operations_a_second,
            "bytes_a_second": machine.bytes_a_second,
            **left_out,
        },
    }


def token_facts(work: Work, epochs: float, largest: int) -> dict[str, Any]:
    """Tokens of one training; for a language model also the number learned."""
    epoch = count_tokens(work.train)
    learned = {} if work.head is not None else {"learned": count_targets(work.train)}
    return {
        "epoch": epoch,
        "all": round(epoch * epochs),
        **learned,
        "largest_forward": largest,
        "cut": work.tokens_cut,
        "said": work.tokens_summary,
    }


def count_tokens(rows: Sequence[Encoded]) -> int:
    """Tokens of the rows."""
    return sum(len(row.ids) for row in rows)


def count_targets(rows: Sequence[Encoded]) -> int:
    """Tokens of the rows that a language model learns to predict."""
    return sum(len(row.ids) - 1 if row.weights is None else sum(map(bool, row.weights)) for row in rows)


def model_facts(config: AnyConfig, model: Model, machine: Machine) -> dict[str, Any]:
    """What trains, in which format, on which device."""
    return {
        "name": model.name,
        "parameters": model.parameters.total,
        "trained": model.parameters.trained,
        "frozen": model.parameters.total - model.parameters.trained,
        "trainable": config.training.trainable,
        "precision": machine.precision,
        "device": str(machine.device),
    }


def storage(
    config: AnyConfig, model: Model, work: Work, machine: Machine, *, largest: int, longest: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Memory and disk by part (bytes)."""
    training = config.training
    state = estimate.optimizer_bytes(training.optimizer, training.momentum, model.parameters)
    half = machine.half_weights
    has_best = training.keep_best and config.validates and bool(work.validation)
    activations = estimate.activation_bytes(
        model.shape,
        tokens=largest,
        longest=longest,
        number_bytes=machine.activation_number_bytes,
        recomputes=training.gradient_checkpointing,
    )
    memory = estimate.memory_bytes(
        process=machine.process,
        parameters=model.parameters,
        half_precision=half,
        optimizer_state=state,
        activations=activations,
        reloads_best=has_best,
        merges=training.trainable == "lora",
    )
    if config.copies_start:
        memory["reference"] = memory["weights"]
    if work.head is None:
        memory["buffers"] = max(memory["buffers"], generation_bytes(config, model, longest, 2 if half else 4))
        memory["logits"] = estimate.logit_bytes(
            width=model.shape.width,
            vocabulary=model.vocabulary,
            number_bytes=2 if half else 4,
            trains_output=model.trains_output,
        )
    moves = False
    if isinstance(config, PreferenceConfig):
        if config.copies_reference:
            memory["reference"] = estimate.copy_bytes(model.parameters, half_precision=half)
            moves = config.preference.sync_reference is not None
        if config.data.reward_models:
            memory["reward models"] = (2 if half else 4) * reward_parameters(config)
    if isinstance(config, DistillationConfig) and (teacher := teacher_model(config)) is not None:
        memory["teacher"] = (2 if half else 4) * teacher.parameters.total
        # Its logits of a chunk, beside the student's.
        memory["logits"] += estimate.logit_bytes(
            width=teacher.shape.width,
            vocabulary=teacher.vocabulary,
            number_bytes=2 if half else 4,
            trains_output=False,
        )
    disk = estimate.disk_bytes(
        model.parameters,
        half_precision=half,
        # A reference that moves is in the checkpoint.
        optimizer_state=state + (4 * model.parameters.trained if moves else 0),
        checkpoints=work.trainings * (training.keep_last + int(has_best)) + 1,
    )
    return memory, disk


def generation_bytes(config: Any, model: Model, longest: int, number_bytes: int) -> int:
    """Keys and values while validation generates answers, or the policy writes those of a round; they use the memory
    that training's buffers have freed.
    """
    generated: list[tuple[int, int]] = []
    if isinstance(config, PreferenceConfig) and config.online is not None:
        answers = preference_rounds.plan_of(config, num_prompts=1, rank=0, world=1).batch_size
        generated.append((min(_GENERATED_TOGETHER, answers), longest))
    if isinstance(config, DistillationConfig) and config.is_on_policy:
        answers = distillation_rounds.plan_of(config, num_rows=1, rank=0, world=1).batch_size
        generated.append((min(_GENERATED_TOGETHER, answers), longest + config.online.max_new_tokens))
    if config.generates:
        generated.append((generated_rows(config), longest + config.generation.max_new_tokens))
    return max(
        (
            estimate.cache_bytes(
                model.shape, layers=model.num_layers, rows=rows, columns=columns, number_bytes=number_bytes
            )
            for rows, columns in generated
        ),
        default=0,
    )


def teacher_model(config: DistillationConfig) -> Model | None:
    """The teacher as shapes; None where rows hold its log-probabilities. Raises `UserError`."""
    architecture = open_teacher(config)
    if architecture is None:
        return None
    return meta_model(_whole(config.training), architecture, head=None, trust_remote_code=False)


def _whole(training: TrainingSection) -> TrainingSection:
    """Settings of a model that has nothing beside its weights."""
    return training.model_copy(update={"trainable": "all", "freeze_layers": 0, "unfreeze_step": None})


def reward_parameters(config: PreferenceConfig) -> int:
    """Parameters of the reward models that compare the policy's answers."""
    whole = _whole(config.training)
    models = (
        meta_model(whole, each.architecture, head=each.heads, trust_remote_code=False)
        for each in open_reward_shapes(config)
    )
    return sum(model.parameters.total for model in models)


def generated_rows(config: Any) -> int:
    """Answers that validation generates together."""
    return min(_GENERATED_TOGETHER, int(config.num_generated))


def largest_batch(batches: StepBatches[Batch]) -> tuple[int, int]:
    """Tokens of the largest forward pass in the first epoch, and of the longest example."""
    looked_at = range(min(batches.steps_an_epoch, _MOST_STEPS_LOOKED_AT))
    passes = [rows for step in looked_at for rows in batches.rows_of(Cursor(0, step))]
    largest = max(sum(batches.rows.lengths[row] for row in rows) for rows in passes)
    return largest, max(batches.rows.lengths)


def count_validations(config: AnyConfig, steps: int, steps_an_epoch: int) -> int:
    """Validations of a whole run: before the first step, if any, then by `validate_every`, and at the end."""
    every = config.training.validate_every
    if every == "never":
        return 0
    interval = steps_an_epoch if every == "epoch" else int(every)
    return int(config.training.validate_at_start) + -(-steps // interval)
