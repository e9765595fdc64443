"""The responses to one question among the rows of a batch."""

from __future__ import annotations

from torch import Tensor

from lmrl_env.errors import ConfigurationError


def by_group(rewards: Tensor, group_size: int) -> Tensor:
    """Return the rewards with one group a row.

    Args:
        rewards: shape (N,), float; the G responses to a question are adjacent.
        group_size: G, at least 2, a divisor of N.

    Returns:
        A view of shape (N / G, G).

    Raises:
        ConfigurationError: for rewards or a group size that do not form groups.
    """
    if rewards.dim() != 1 or group_size < 2 or len(rewards) % group_size or not len(rewards):
        raise ConfigurationError(
            f"rewards of shape {tuple(rewards.shape)} do not form groups of "
            f"group_size={group_size}: expected shape (N,) and a group size of at least 2 that "
            "divides N; a response's advantage is against the others of its group"
        )
    return rewards.reshape(-1, group_size)


def has_signal(rewards: Tensor, group_size: int, tolerance: float = 1e-6) -> Tensor:
    """Return which groups teach something: those whose rewards differ by more than the tolerance.

    Args:
        rewards: shape (N,), float.
        group_size: G.
        tolerance: in units of reward.

    Returns:
        Shape (N / G,), bool.

    >>> import torch
    >>> has_signal(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ True, False])
    """
    groups = by_group(rewards, group_size)
    return groups.amax(dim=1) - groups.amin(dim=1) > tolerance
