"""The length bias exactly: where an algorithm file drives the tails of a small MDP, enumerated.

The MDP is the tiny base in small. Its first token commits to a result, right in a quarter of the
responses; after it the solution has a fixed length; then one sentence after the other is added or
the response ends, with even odds. A unit of length is a tail sentence.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmrl_env.algorithm_files import load_algorithms
from lmrl_env.exact import TokenMDP, enumerate_trajectories, expected_gradient, flat_gradient

GROUP_SIZE = 8
TAILS = 3
PASS_RATE = 0.25
EOS = 2


class Base(nn.Module):
    """Commits by token 0 to a right and by 1 to a wrong result, and then goes on by token 0.

    Args:
        lengths: of the solutions, right and wrong, at least 1 each.
        shared: whether the same parameters choose the tail after right and wrong results.
    """

    def __init__(self, lengths: tuple[int, int], shared: bool):
        super().__init__()
        self.lengths = lengths
        start = math.log(PASS_RATE / (1 - PASS_RATE))
        self.commits = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        rows = 1 if shared else 2
        self.goes_on = nn.Parameter(torch.zeros(rows, TAILS, dtype=torch.float64))

    def forward(self, question: int, prefix: tuple[int, ...]) -> Tensor:
        """Return log-probabilities of the next token, shape (3,)."""
        never = torch.full((1,), -math.inf, dtype=torch.float64)
        if not prefix:
            return torch.cat([self.commits, torch.zeros(1).double(), never]).log_softmax(0)
        tail = len(prefix) - self.lengths[prefix[0]]
        if tail < 0:
            return torch.cat([torch.zeros(1).double(), never, never])
        if tail == TAILS:
            return torch.cat([never, never, torch.zeros(1).double()])
        on = self.goes_on[prefix[0] % len(self.goes_on), tail, None]
        return torch.cat([on.sigmoid().log(), never, (-on).sigmoid().log()])


WORLDS = {
    "can tell": {"lengths": (5, 3), "shared": False},
    "cannot tell, wrong solutions shorter": {"lengths": (5, 3), "shared": True},
    "cannot tell, equal lengths": {"lengths": (4, 4), "shared": True},
}
"""Whether the choice of a tail knows the result, and the lengths of right and wrong solutions."""


def drift(algorithm: Path, world: str) -> dict[str, float]:
    """Return how fast the expected update lengthens ``right`` and ``wrong`` answers.

    Args:
        algorithm: file with the two functions.
        world: of ``WORLDS``.

    Returns:
        Derivatives of E[length | right] and E[length | wrong], in tail sentences, along the update
        and per unit of its norm.
    """
    (file,) = load_algorithms([algorithm])
    policy = Base(**WORLDS[world])  # type: ignore[arg-type]
    horizon = max(policy.lengths) + TAILS + 1
    mdp = TokenMDP(3, horizon, lambda _, tokens, __: float(tokens[0] == 0), eos=EOS)
    settings: dict[str, Any] = {"group_size": GROUP_SIZE, "collapsed": True}
    if file.has_critic:
        settings = {"group_size": 1, "critic": lambda question, prefix: PASS_RATE}
    functions = file.compute_advantages, file.policy_loss
    update = expected_gradient(*functions, mdp, policy, **settings)
    trajectories = enumerate_trajectories(mdp, policy)
    found = {}
    for kind, reward in (("right", 1), ("wrong", 0)):
        probs = trajectories.logprobs(policy).sum(1).exp() * (trajectories.rewards == reward)
        mean_length = (probs * trajectories.lengths).sum() / probs.sum()
        found[kind] = (flat_gradient(mean_length, policy) @ update / update.norm()).item()
    return found
