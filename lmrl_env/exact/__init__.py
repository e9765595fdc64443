"""Token MDPs small enough to enumerate: what other code estimates, exact and in float64.

The objective J, its gradient, the distribution of responses, of groups and of batches, and the
expectation of the gradient of any estimator that is written like the files in ``algos/``.

>>> mdp = TokenMDP(2, 3, reward=lambda question, tokens, terminated: terminated, eos=1)
>>> policy = TabularPolicy(mdp, scale=0)
>>> objective(mdp, policy).item()  # it fails to end three times with 1/8
0.875
"""

from lmrl_env.exact.batches import Batches, enumerate_batches
from lmrl_env.exact.expectation import expected_gradient
from lmrl_env.exact.mdp import (
    TabularPolicy,
    TokenMDP,
    TokenPolicy,
    TrainablePolicy,
    verifier_reward,
)
from lmrl_env.exact.trajectories import (
    Trajectories,
    enumerate_trajectories,
    exact_gradient,
    flat_gradient,
    objective,
    state_values,
)
from lmrl_env.exact.variance import GradientMoments, leave_one_out_moments

__all__ = [
    "Batches",
    "GradientMoments",
    "TabularPolicy",
    "TokenMDP",
    "TokenPolicy",
    "TrainablePolicy",
    "Trajectories",
    "enumerate_batches",
    "enumerate_trajectories",
    "exact_gradient",
    "expected_gradient",
    "flat_gradient",
    "leave_one_out_moments",
    "objective",
    "state_values",
    "verifier_reward",
]
