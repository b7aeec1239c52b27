"""`loopos train --dry-run`: what a run would take, with nothing started and nothing written.

Enters: a config. Leaves: counts of parameters, rows, tokens and steps, all exact, and estimates of memory, disk and
time (see `estimate` for the formulas). The model is built on the "meta" device, as shapes without numbers; the two
rates of the time estimate are measured here, for about a second. Left out: several processes; the time that generated
answers take.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from loopos.cli import estimate
from loopos.cli.answers import as_bytes, as_time, say, say_json
from loopos.cli.rates import measured_rates
from loopos.cli.shapes import Model, meta_model
from loopos.cli.work import AnyConfig, Work, work_of
from loopos.config.chain_of_thought import ChainOfThoughtConfig
from loopos.data.batches import Batch, Cursor, PackedRows, StepBatches
from loopos.data.tokens import Encoded
from loopos.training.precision import pick_device, resolve

# Enough steps of the first epoch to meet its largest batch, or one near it.
_MOST_STEPS_LOOKED_AT = 2000
# Problems that validation answers together.
_GENERATED_TOGETHER = 64


def run(config: AnyConfig, *, trust_remote_code: bool, as_json: bool) -> int:
    """Prints the plan of a run. Raises `UserError`, as the run would."""
    plan = plan_of(config, trust_remote_code=trust_remote_code)
    if as_json:
        say_json(plan)
    else:
        say(described(plan))
    return 0


def plan_of(config: AnyConfig, *, trust_remote_code: bool) -> dict[str, Any]:
    """All figures of the dry run, as one JSON object."""
    training = config.training
    work = work_of(config, trust_remote_code=trust_remote_code)
    device = pick_device(training.device)
    precision = resolve(training.precision, device)
    # This process has imported and read what training will have; beside a CUDA device it has memory of its own.
    process = psutil.Process().memory_info().rss if device.type != "cuda" else 0
    model = meta_model(config, work, trust_remote_code=trust_remote_code)
    batches = StepBatches.of(training, PackedRows(work.train, None, device), rank=0, world=1)
    planned = training.num_epochs * batches.steps_an_epoch
    steps = planned if training.max_steps is None else min(planned, training.max_steps)
    epochs = steps / batches.steps_an_epoch
    largest, longest = largest_batch(batches)
    memory, disk = storage(config, model, work, precision, largest=largest, longest=longest, process=process)
    rate, copy_rate = measured_rates(device, half=precision != "fp32")
    validations = count_validations(config, steps, batches.steps_an_epoch) if work.validation else 0
    seconds = work.trainings * estimate.training_seconds(
        model.parameters,
        tokens=round(count_tokens(work.train) * epochs),
        validation_tokens=validations * count_tokens(work.validation),
        steps=steps,
        optimizer_state=estimate.optimizer_bytes(training.optimizer, training.momentum, model.parameters),
        backward_share=model.shape.layers / model.num_layers,
        operations_a_second=rate,
        bytes_a_second=copy_rate,
        output=model.output,
        targets=round(count_targets(work.train) * epochs),
        validation_targets=validations * count_targets(work.validation),
        trains_output=model.trains_output,
    )
    return {
        "model": model_facts(config, model, precision, device),
        "data": {"said": work.said},
        "rows": {"train": len(work.train), "validation": len(work.validation)},
        "tokens": token_facts(work, epochs, largest),
        "steps": {
            "epoch": batches.steps_an_epoch,
            "all": steps,
            **({} if work.head is not None else {"trainings": work.trainings}),
        },
        "memory": {**memory, "peak": sum(memory.values()), "there": memory_there(device)},
        "disk": {**disk, "all": disk["checkpoints"] + disk["model"], "free": free_bytes(config.data.output_dir)},
        "time": {"seconds": seconds, "operations_a_second": rate, "bytes_a_second": copy_rate},
    }


def token_facts(work: Work, epochs: float, largest: int) -> dict[str, Any]:
    """Tokens of one training; of a language model also those that are learned."""
    epoch = count_tokens(work.train)
    learned = {} if work.head is not None else {"learned": count_targets(work.train)}
    return {
        "epoch": epoch,
        "all": round(epoch * epochs),
        **learned,
        "largest_forward": largest,
        "cut": work.tokens_cut,
        "said": work.tokens_said,
    }


def count_tokens(rows: Sequence[Encoded]) -> int:
    """Tokens of the rows."""
    return sum(len(row.ids) for row in rows)


def count_targets(rows: Sequence[Encoded]) -> int:
    """Tokens of the rows that a language model learns to predict."""
    return sum(len(row.ids) - 1 if row.weights is None else sum(map(bool, row.weights)) for row in rows)


def model_facts(config: AnyConfig, model: Model, precision: str, device: torch.device) -> dict[str, Any]:
    """What trains, in which format, where."""
    return {
        "name": model.name,
        "parameters": model.parameters.total,
        "trained": model.parameters.trained,
        "frozen": model.parameters.total - model.parameters.trained,
        "trainable": config.training.trainable,
        "precision": precision,
        "device": str(device),
    }


def memory_there(device: torch.device) -> int:
    """Bytes of memory of the device that trains."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def storage(
    config: AnyConfig, model: Model, work: Work, precision: str, *, largest: int, longest: int, process: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Memory and disk by part (bytes)."""
    training = config.training
    state = estimate.optimizer_bytes(training.optimizer, training.momentum, model.parameters)
    half = precision == "bf16"
    has_best = training.keep_best and config.validates and bool(work.validation)
    activations = estimate.activation_bytes(
        model.shape,
        tokens=largest,
        longest=longest,
        number_bytes=4 if precision == "fp32" else 2,
        recomputes=training.gradient_checkpointing,
    )
    memory = estimate.memory_bytes(
        process=process,
        parameters=model.parameters,
        half_precision=half,
        optimizer_state=state,
        activations=activations,
        reloads_best=has_best,
        merges=training.trainable == "lora",
    )
    if work.head is None:
        memory["buffers"] = max(memory["buffers"], generation_bytes(config, model, longest, 2 if half else 4))
        memory["logits"] = estimate.logit_bytes(
            width=model.shape.width,
            vocabulary=model.vocabulary,
            number_bytes=2 if half else 4,
            trains_output=model.trains_output,
        )
    disk = estimate.disk_bytes(
        model.parameters,
        half_precision=half,
        optimizer_state=state,
        checkpoints=work.trainings * (training.keep_last + int(has_best)) + 1,
    )
    return memory, disk


def generation_bytes(config: AnyConfig, model: Model, longest: int, number_bytes: int) -> int:
    """Keys and values while validation answers problems: in the room that training's buffers have left."""
    if not isinstance(config, ChainOfThoughtConfig) or not config.generates:
        return 0
    rows = min(_GENERATED_TOGETHER, config.evaluation.problems * config.generation.chains)
    columns = longest + config.generation.max_new_tokens
    return estimate.cache_bytes(
        model.shape, layers=model.num_layers, rows=rows, columns=columns, number_bytes=number_bytes
    )


def largest_batch(batches: StepBatches[Batch]) -> tuple[int, int]:
    """Tokens of the largest forward pass in the first epoch, and of the longest example."""
    looked_at = range(min(batches.steps_an_epoch, _MOST_STEPS_LOOKED_AT))
    passes = [rows for step in looked_at for rows in batches.rows_of(Cursor(0, step))]
    largest = max(sum(batches.rows.lengths[row] for row in rows) for rows in passes)
    return largest, max(batches.rows.lengths)


def count_validations(config: AnyConfig, steps: int, steps_an_epoch: int) -> int:
    """Validations of a whole run: before the first step, then as `validate_every` says, and at the end."""
    every = config.training.validate_every
    if every == "never":
        return 0
    interval = steps_an_epoch if every == "epoch" else int(every)
    return 1 + -(-steps // interval)


def free_bytes(folder: str) -> int:
    """Free bytes on the disk that `folder` is, or would be, on."""
    place = Path(folder).absolute()
    existing = next(each for each in (place, *place.parents) if os.path.exists(each))
    return shutil.disk_usage(existing).free


def described(plan: dict[str, Any]) -> str:
    """The plan in lines."""
    model, rows, tokens, steps, memory, disk, spent = (
        plan[name] for name in ("model", "rows", "tokens", "steps", "memory", "disk", "time")
    )
    parts = " + ".join(f"{name} {as_bytes(size)}" for name, size in memory.items() if name not in ("peak", "there"))
    share = f"{model['trained'] / model['parameters']:.1%}"
    with_head = "" if "learned" in tokens else " with its head"
    learned = f"{tokens['learned']:,} of an epoch learned; " if "learned" in tokens else ""
    times = f", {steps['trainings']} trainings" if steps.get("trainings", 1) > 1 else ""
    lines = {
        "model": f"{model['name']}{with_head}, {model['parameters']:,} parameters",
        "trains": f"{model['trained']:,} ({model['trainable']}, {share}), frozen {model['frozen']:,}; "
        f"{model['precision']} on {model['device']}",
        "data": "; ".join(plan["data"]["said"]),
        "rows": f"{rows['train']:,} train, {rows['validation']:,} validation",
        "tokens": f"{tokens['epoch']:,} an epoch, {tokens['all']:,} in all; {learned}{tokens['said']}",
        "steps": f"{steps['epoch']:,} an epoch, {steps['all']:,} in all{times}; "
        f"at most {tokens['largest_forward']:,} tokens in one forward pass",
        "memory": f"about {as_bytes(memory['peak'])} at the peak, of {as_bytes(memory['there'])}\n{'':10}({parts})",
        "disk": f"about {as_bytes(disk['all'])} at the most (a checkpoint {as_bytes(disk['checkpoint'])}, the model "
        f"{as_bytes(disk['model'])}); {as_bytes(disk['free'])} free",
        "time": f"about {as_time(spent['seconds'])} of training, without loading and saving (measured now: "
        f"{spent['operations_a_second'] / 1e9:,.0f} GFLOP/s, {spent['bytes_a_second'] / 1e9:.0f} GB/s)",
    }
    return "\n".join(f"{name:<8}  {text}" for name, text in lines.items())
