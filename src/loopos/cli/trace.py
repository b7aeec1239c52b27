"""Chains of reasoning as text for people and as JSON records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from loopos.data.step_format import StepFormat
    from loopos.evaluation.reasoning import Answered
    from loopos.generation.completions import Completion
    from loopos.generation.steps import Chain, Step

Recorded: TypeAlias = str | list[dict[str, object]]
"""A prompt in a record: a text, or messages."""


def described(chain: Chain, step_format: StepFormat) -> str:
    """The trace of a chain: each step with its number and logprob (nats), then the answer."""
    steps, answer = steps_text(chain, step_format), step_format.parse(chain.text).answer
    lines = [f"{number}. {step.text.strip()}  [{step.logprob:.2f}]" for number, step in enumerate(steps, start=1)]
    if answer:
        where = (
            f"[{chain.answer.logprob:.2f}]" if chain.well_formed else "(the answer was not in the expected step format)"
        )
        return "\n".join([*lines, f"answer: {answer}  {where}"])
    why = {"length": "the token limit", "stop": "a stop token"}.get(chain.finish_reason, f"a {chain.finish_reason}")
    return "\n".join([*lines, f"answer: none (ended by {why})"])


def steps_text(chain: Chain, step_format: StepFormat) -> tuple[Step, ...]:
    """The steps of a chain; none if its text is an answer without reasoning."""
    return chain.steps if chain.well_formed or step_format.parse(chain.text).steps else ()


def confidence_summary(answered: Answered) -> str:
    """The confidence in an answer chosen from several chains."""
    num_chains = len(answered.chains)
    if answered.rewards:
        return f"best of {num_chains} chains, reward {answered.rewards[0]:.3f}"
    if answered.confidence is None:
        return ""
    if answered.is_voted:
        return f"{round(answered.confidence * num_chains)} of {num_chains} chains agree"
    return f"best of {num_chains} chains, mean logprob {answered.confidence:.3f}"


def completion_record(prompt: Recorded, completion: Completion) -> dict[str, Any]:
    """The JSON record of a completion."""
    return {
        "prompt": prompt,
        "text": completion.text,
        "logprob": sum(completion.logprobs),
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }


def chain_record(prompt: Recorded, chain: Chain, step_format: StepFormat) -> dict[str, Any]:
    """The JSON record of a chain."""
    steps = steps_text(chain, step_format)
    return {
        "prompt": prompt,
        "text": chain.text,
        "steps": [{"text": step.text, "logprob": step.logprob, "tokens": step.tokens} for step in steps],
        "answer": step_format.parse(chain.text).answer,
        "logprob": sum(chain.logprobs),
        "finish_reason": chain.finish_reason,
        "tokens": len(chain.token_ids),
    }


def answered_record(prompt: Recorded, answered: Answered, step_format: StepFormat) -> dict[str, Any]:
    """The JSON record of an answer chosen from several chains: the chosen chain, and all answers."""
    chosen = answered.chains[answered.chosen or 0]
    record = chain_record(prompt, chosen, step_format)
    record["answer"] = answered.answer
    record["confidence"] = answered.confidence
    record["answers"] = [step_format.parse(chain.text).answer for chain in answered.chains]
    if answered.rewards:
        # Infinite: the chain did not fit into the reward model.
        record["rewards"] = [reward if math.isfinite(reward) else None for reward in answered.rewards]
    return record


def blocks(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> str:
    """The texts of each prompt, one after the other: a single text bare, several under their numbers."""
    parts: list[str] = []
    for number, (prompt, samples) in enumerate(zip(prompts, texts, strict=True), start=1):
        if len(prompts) > 1:
            parts.append(f"=== {number}: {' '.join(prompt.split())[:100]}")
        for sample, text in enumerate(samples, start=1):
            parts.append(f"--- {sample}\n{text}" if len(samples) > 1 else text)
    return "\n".join(parts)
