"""Your own estimator of the policy gradient: proved unbiased, or shown how far it turns.

python examples/prove_your_estimator.py
"""

from lmrl_env.testing import assert_unbiased, bias_report


def compute_advantages(rewards, group_size):
    """Return the reward above the mean of the other responses to the question."""
    groups = rewards.reshape(-1, group_size)
    baseline = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - baseline).reshape(-1)


def policy_loss(logprobs, old_logprobs, advantages, mask, totals):
    """Return minus the advantages of all tokens, summed over each response."""
    ratio = (logprobs - old_logprobs).exp()
    return -(ratio * advantages[:, None] * mask).sum() / totals.responses, {}


def loss_by_length(logprobs, old_logprobs, advantages, mask, totals):
    """Return the same, but with each response's sum divided by its length."""
    ratio = (logprobs - old_logprobs).exp()
    means = (ratio * advantages[:, None] * mask).sum(dim=1) / mask.sum(dim=1)
    return -means.sum() / totals.responses, {}


def test_my_estimator_is_unbiased():
    assert_unbiased(compute_advantages, policy_loss, up_to_scale=False)


def main() -> None:
    """Prove the first and report on the second."""
    test_my_estimator_is_unbiased()
    print("Summed over the response, it is unbiased, in direction and size:")
    print(bias_report(compute_advantages, policy_loss))
    print("\nDivided by the response's length, it is not:")
    print(bias_report(compute_advantages, loss_by_length))


if __name__ == "__main__":
    main()
