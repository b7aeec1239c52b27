"""The plan of a dry run in lines for people.

Enters: the plan as one JSON object. Leaves: text. Left out: the figures (`dry_run`, `policy_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopos.cli.answers import as_bytes, as_time


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
    """What a run needs more of than there is, with how much."""
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
    learned = f"{tokens['learned']:,} of an epoch learned; " if "learned" in tokens else ""
    times = f", {steps['trainings']} trainings" if steps.get("trainings", 1) > 1 else ""
    compared = ""
    if "pairs" in rows:
        compared = f"; comparisons, those to train on with {rows['responses']:,} responses in {rows['pairs']:,} pairs"
    return {
        "model": f"{model['name']}{with_head}, {model['parameters']:,} parameters",
        "trains": _trains(model),
        "data": "; ".join(plan["data"]["said"]),
        "rows": f"{rows['train']:,} train, {rows['validation']:,} validation{compared}",
        "tokens": f"{tokens['epoch']:,} an epoch, {tokens['all']:,} in all; {learned}{tokens['said']}",
        "steps": f"{steps['epoch']:,} an epoch, {steps['all']:,} in all{times}; "
        f"at most {tokens['largest_forward']:,} tokens in one forward pass",
        **_cost(plan),
    }


def _policy(plan: Mapping[str, Any]) -> dict[str, str]:
    model, prompts, tokens, steps = (plan[name] for name in ("model", "prompts", "tokens", "steps"))
    copies = f"{model['copies']} {'copy' if model['copies'] == 1 else 'copies'} of the weights"
    roles = [f"{name}: {role['is']}, {role['parameters']:,}" for name, role in model["roles"].items()]
    return {
        "model": f"{model['name']}, {copies} for {len(roles)} roles, {model['parameters']:,} parameters",
        "roles": f"\n{'':10}".join(roles),
        "trains": _trains(model),
        "data": "; ".join(plan["data"]["said"]),
        "prompts": f"{prompts['train']:,} train, {prompts['validation']:,} validation; {prompts['said']}",
        "tokens": f"with responses of {tokens['response']:,} tokens, the longest: about {tokens['iteration']:,} an "
        f"iteration, {tokens['trained']:,} trained on in all",
        "steps": f"{plan['iterations']:,} iterations of {prompts['iteration']:,} responses, "
        f"{steps['iteration']:,} optimizer steps each, {steps['all']:,} in all; "
        f"at most {tokens['largest_forward']:,} tokens in one forward pass",
        **_cost(plan),
    }


def _trains(model: Mapping[str, Any]) -> str:
    share = f"{model['trained'] / model['parameters']:.1%}"
    return (
        f"{model['trained']:,} ({model['trainable']}, {share}), frozen {model['frozen']:,}; "
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
        "disk": f"about {as_bytes(disk['all'])} at the most (a checkpoint {as_bytes(disk['checkpoint'])}, the model "
        f"{as_bytes(disk['model'])}); {as_bytes(disk['free'])} free",
        "time": f"about {as_time(spent['seconds'])} of training{of_parts}, without loading and saving{left_out} "
        f"(measured now: {spent['operations_a_second'] / 1e9:,.0f} GFLOP/s, {spent['bytes_a_second'] / 1e9:.0f} GB/s)",
        "verdict": _verdict(plan),
    }
