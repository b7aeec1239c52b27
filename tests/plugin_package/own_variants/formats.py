"""Rows with answers ordered from best to worst."""

from loopos import register_format


@register_format("ordered_answers")
def ordered_answers(row):
    """A question and its answers, best first: the first is preferred to the last."""
    if len(row["answers"]) < 2:
        raise ValueError(f"got {len(row['answers'])} answers; expected at least 2")
    return {"prompt": row["question"], "chosen": row["answers"][0], "rejected": row["answers"][-1]}
