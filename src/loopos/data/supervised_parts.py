"""Examples → parts of text with the factor on their loss: what is context, what is learned.

Enters: an example, the chat template, the `StepFormat`, what to train on. Leaves: `Part`s in order, whose texts
together are the example; reasoning and answer are parts of their own. Left out: tokens (`supervised_tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.data.conversations import ASSISTANT, Message
from loopos.data.demonstrations import Demonstration
from loopos.data.step_format import StepFormat
from loopos.data.supervised_rows import Completion, Example, PlainText
from loopos.data.template_checks import check_reasoning
from loopos.data.templates import ChatTemplate, Piece
from loopos.data.tool_schemas import Tool

TrainOn: TypeAlias = Literal["all", "assistant", "answer"]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece with the factor on the loss of its tokens; 0 = context."""

    piece: Piece
    weight: float


def before_answer(example: Demonstration) -> list[Message]:
    """The messages that a demonstration's chain answers."""
    system = [Message("system", example.system)] if example.system is not None else []
    return [*system, Message("user", example.problem)]


def parts_of(example: Example, template: ChatTemplate, step_format: StepFormat, train_on: TrainOn) -> list[Part]:
    """The parts of an example, as `supervised_tokens.encode_supervised` says. Raises `TemplateRefusal`."""
    context = 1.0 if train_on == "all" else 0.0
    tools: tuple[Tool, ...] = ()
    match example:
        case PlainText(text=text):
            return [Part(Piece(text, begins=True, closes=True), 1.0)]
        case Completion(prompt=prompt, completion=completion):
            return [Part(Piece(prompt, begins=True), context), Part(Piece(completion, closes=True), 1.0)]
        case Demonstration():
            chain = step_format.render(example.steps, example.answer)
            messages, num_prompt = [*before_answer(example), Message(ASSISTANT, chain)], 0
        case _:
            messages, num_prompt, tools = list(example.messages), example.num_prompt, example.tools
    pieces = template.pieces(messages, tools)
    last = max((piece.message for piece in pieces if piece.message is not None), default=None)
    parts: list[Part] = []
    for piece in pieces:
        if piece.message is None:
            parts.append(Part(piece, context))
            continue
        weight = messages[piece.message].weight if piece.message >= num_prompt else context
        if weight > 0:
            check_reasoning(messages[piece.message], piece.text)
        is_last = piece.message == last
        if not is_last:
            parts.append(Part(piece, 0.0 if train_on == "answer" else weight))
            continue
        start = step_format.answer_start(piece.text)
        if start > 0:
            reasoning = Piece(piece.text[:start], piece.message)
            parts.append(Part(reasoning, 0.0 if train_on == "answer" else weight))
        parts.append(Part(Piece(piece.text[start:], piece.message, closes=piece.closes), weight))
    return parts
