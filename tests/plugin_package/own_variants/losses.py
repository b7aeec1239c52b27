"""A loss of classes and a loss of pairs of scores, each one number per row."""

from loopos import register_loss


@register_loss("focal", methods=("fine_tuning",), tasks=("classification",))
def focal(logits, labels):
    """Focal loss with γ = 2: (1 − p)²·(−log p) of the right class (Lin et al. 2017)."""
    logprobs = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return -(1 - logprobs.exp()).square() * logprobs


@register_loss("pair_hinge", methods=("reward_model",))
def pair_hinge(better, worse):
    """Hinge loss of the gap of two scores, with margin 1."""
    return (1 - (better - worse)).clamp(min=0)


def mean_of_rows(logits, labels):
    """A mistake: one number for all rows."""
    return focal(logits, labels).mean()
