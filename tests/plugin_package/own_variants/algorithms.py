"""REINFORCE without a critic (Williams 1992)."""

from loopos import register_algorithm


def log_likelihood(inputs):
    """−A·log π of each token."""
    return -inputs.advantages * inputs.logprobs


@register_algorithm("reinforce", policy_loss=log_likelihood)
def reinforce(inputs):
    """REINFORCE with the mean reward of the iteration as baseline."""
    reward = inputs.rewards.sum(1)
    return (reward - reward.mean())[:, None].expand_as(inputs.rewards)


@register_algorithm("group_reinforce", policy_loss=log_likelihood, groups=True)
def group_reinforce(inputs):
    """REINFORCE with the mean reward of the responses to the same prompt as baseline."""
    reward, groups = inputs.rewards.sum(1), inputs.groups
    sums, counts = (reward.new_zeros(int(groups.max()) + 1) for _ in range(2))
    sums.index_add_(0, groups, reward)
    counts.index_add_(0, groups, reward.new_ones(len(reward)))
    return (reward - (sums / counts)[groups])[:, None].expand_as(inputs.rewards)
