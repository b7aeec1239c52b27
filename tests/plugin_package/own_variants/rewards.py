"""A reward that depends on the row of data."""

from loopos import register_reward


@register_reward("first_letter")
def first_letter(prompts, responses, rows):
    """1 for a response that begins with one of the letters in the row's column `letters`."""
    return [float(response[:1].lower() in set(row["letters"])) for response, row in zip(responses, rows, strict=True)]
