"""All responses of a small token MDP with their probabilities, and what follows exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact.mdp import TokenMDP, TokenPolicy, TrainablePolicy

MAX_TRAJECTORIES = 100_000
"""Most trajectories that are enumerated."""

State = tuple[int, tuple[int, ...]]
"""A question and the tokens that have followed it."""


class Trajectories(NamedTuple):
    """Every response that a policy can give, one a row, to every question that can be asked.

    Attributes:
        states: the states in which a token is chosen.
        visited: shape (L, K), int64: index in ``states`` of where each token was chosen.
        tokens: shape (L, K), int64, left-aligned, 0 at padding.
        mask: shape (L, K), bool, True where a token was chosen.
        questions: shape (L,), int64.
        terminated: shape (L,), bool; False where the budget ended the response.
        token_rewards: shape (L, K), float64.
        probs: shape (L,), float64, of the response given its question, without gradient.
    """

    states: Sequence[State]
    visited: Tensor
    tokens: Tensor
    mask: Tensor
    questions: Tensor
    terminated: Tensor
    token_rewards: Tensor
    probs: Tensor

    @property
    def rewards(self) -> Tensor:
        """Sum of each response's token rewards, shape (L,)."""
        return self.token_rewards.sum(dim=1)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each response, shape (L,)."""
        return self.mask.sum(dim=1)

    def logprobs(self, policy: TokenPolicy) -> Tensor:
        """Return the log-probability of each token under any policy, with its gradient.

        Returns:
            Shape (L, K), float64, nats; 0 at padding.

        Raises:
            ConfigurationError: if the policy gives no float64 log-probabilities.
        """
        table = torch.stack([_next_token(policy, state) for state in self.states])  # (S, V)
        return table[self.visited, self.tokens].where(self.mask, 0.0)

    def values(self, critic: Callable[[int, tuple[int, ...]], float]) -> Tensor:
        """Return a critic's value of the state before each token.

        Returns:
            Shape (L, K), float64; 0 at padding.
        """
        table = torch.tensor([float(critic(*state)) for state in self.states], dtype=torch.float64)
        return table[self.visited].where(self.mask, 0.0)


def enumerate_trajectories(mdp: TokenMDP, policy: TokenPolicy) -> Trajectories:
    """Return all responses of positive probability.

    Args:
        mdp: whose questions of positive probability are asked.
        policy: that answers them.

    Raises:
        ConfigurationError: if there are more than ``MAX_TRAJECTORIES`` of them, a reward is no
            finite number, or the policy gives no float64 log-probabilities.

    >>> from lmrl_env.exact import TabularPolicy
    >>> mdp = TokenMDP(2, 2, reward=lambda question, tokens, terminated: terminated, eos=1)
    >>> trajectories = enumerate_trajectories(mdp, TabularPolicy(mdp, scale=0))
    >>> trajectories.tokens.tolist(), trajectories.lengths.tolist()
    ([[1, 0], [0, 0], [0, 1]], [1, 2, 2])
    >>> trajectories.probs.tolist(), trajectories.rewards.tolist()
    ([0.5, 0.25, 0.25], [1.0, 0.0, 1.0])
    """
    states: list[State] = []
    ended: list[tuple[State, tuple[int, ...], float]] = []  # state, rows visited, log-probability
    frontier: list[tuple[State, tuple[int, ...], float]] = [
        ((question, ()), (), 0.0) for question, p in enumerate(mdp.question_probs) if p > 0
    ]
    while frontier:
        grown: list[tuple[State, tuple[int, ...], float]] = []
        for (question, prefix), visited, logprob in frontier:
            visited = (*visited, len(states))
            states.append((question, prefix))
            with torch.no_grad():
                next_token = _next_token(policy, states[-1], mdp.vocab_size).tolist()
            for token, step in enumerate(next_token):
                tokens = (*prefix, token)
                if step == -torch.inf:
                    continue
                ends = token == mdp.eos or len(tokens) == mdp.horizon
                (ended if ends else grown).append(((question, tokens), visited, logprob + step))
            if len(ended) + len(grown) > MAX_TRAJECTORIES:
                raise ConfigurationError(
                    f"vocab_size={mdp.vocab_size}, horizon={mdp.horizon} and "
                    f"{len(mdp.question_probs)} questions give more than {MAX_TRAJECTORIES} "
                    "trajectories, the most that are enumerated: take a smaller vocabulary or "
                    "horizon"
                )
        frontier = grown
    rows = [state for state, _, _ in ended]
    terminated = [tokens[-1] == mdp.eos for _, tokens in rows]
    lengths = torch.tensor([len(tokens) for _, tokens in rows])
    return Trajectories(
        states=tuple(states),
        visited=_padded([visited for _, visited, _ in ended], mdp.horizon),
        tokens=_padded([tokens for _, tokens in rows], mdp.horizon),
        mask=torch.arange(mdp.horizon) < lengths[:, None],
        questions=torch.tensor([question for question, _ in rows]),
        terminated=torch.tensor(terminated),
        token_rewards=torch.tensor(
            [_token_rewards(mdp, *row, end) for row, end in zip(rows, terminated, strict=True)],
            dtype=torch.float64,
        ),
        probs=torch.tensor([logprob for _, _, logprob in ended], dtype=torch.float64).exp(),
    )


def objective(mdp: TokenMDP, policy: TokenPolicy) -> Tensor:
    """Return the expected reward of a response, with its gradient.

    J(θ) = E_q E_{o ~ π_θ(·|q)} R(q, o)      Liu et al. 2025, arXiv:2503.20783, eq. (1) with β = 0

    Returns:
        A scalar, float64, in units of reward.

    Raises:
        ConfigurationError: as ``enumerate_trajectories``.
    """
    trajectories = enumerate_trajectories(mdp, policy)
    question_probs = torch.tensor(mdp.question_probs, dtype=torch.float64)
    probs = trajectories.logprobs(policy).sum(dim=1).exp()
    return (question_probs[trajectories.questions] * probs * trajectories.rewards).sum()


def exact_gradient(mdp: TokenMDP, policy: TrainablePolicy) -> Tensor:
    """Return ∇J(θ), shape (P,), flat over the policy's parameters.

    Raises:
        ConfigurationError: as ``enumerate_trajectories``.

    >>> from lmrl_env.exact import TabularPolicy
    >>> bandit = TokenMDP(2, 1, reward=lambda question, tokens, terminated: tokens[0])
    >>> exact_gradient(bandit, TabularPolicy(bandit, scale=0))  # ±p(1-p)
    tensor([-0.2500,  0.2500], dtype=torch.float64)
    """
    return flat_gradient(objective(mdp, policy), policy)


def flat_gradient(
    value: Tensor, policy: TrainablePolicy, grad_outputs: Tensor | None = None
) -> Tensor:
    """Return the gradient of a value in all parameters of the policy that are trained, as one row.

    Args:
        value: computed from the policy; a scalar unless ``grad_outputs`` are given.
        policy: whose parameters are laid out in the order of ``named_parameters``.
        grad_outputs: shape of ``value``: weights of its elements.

    Returns:
        Shape (P,); 0 for a parameter that the value does not depend on.
    """
    parameters = [p for _, p in policy.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, grad_outputs, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def state_values(mdp: TokenMDP, policy: TokenPolicy) -> dict[State, float]:
    """Return the exact value of every state that the policy can reach, the ideal critic.

    V(s) = E[ Σ_{t' ≥ t} r_t' | s_t = s ], without discount.

    >>> from lmrl_env.exact import TabularPolicy
    >>> mdp = TokenMDP(2, 2, reward=lambda question, tokens, terminated: float(sum(tokens)))
    >>> state_values(mdp, TabularPolicy(mdp, scale=0))
    {(0, ()): 1.0, (0, (0,)): 0.5, (0, (1,)): 1.5}
    """
    trajectories = enumerate_trajectories(mdp, policy)
    to_go = trajectories.token_rewards.flip(1).cumsum(1).flip(1)  # (L, K)
    weights = trajectories.probs[:, None].expand_as(to_go)
    sums = torch.zeros(2, len(trajectories.states), dtype=torch.float64)
    where = trajectories.visited[trajectories.mask]
    sums.index_add_(1, where, torch.stack([weights * to_go, weights])[:, trajectories.mask])
    return dict(zip(trajectories.states, (sums[0] / sums[1]).tolist(), strict=True))


def _next_token(policy: TokenPolicy, state: State, vocab_size: int | None = None) -> Tensor:
    """Return the policy's log-probabilities in a state, if they are such."""
    logprobs = policy(*state)
    size = vocab_size or logprobs.shape[-1]
    if logprobs.shape != (size,) or logprobs.dtype != torch.float64:
        raise ConfigurationError(
            f"in state {state} the policy gave {logprobs.dtype} of shape {tuple(logprobs.shape)}: "
            f"expected float64 log-probabilities of shape ({size},), for exact results; convert "
            "the model with .double() and end with log_softmax(-1)"
        )
    total = logprobs.detach().exp().sum().item()
    if not abs(total - 1) < 1e-9:
        raise ConfigurationError(
            f"in state {state} the policy's probabilities sum to {total}: expected 1; return "
            "log-probabilities, logits.log_softmax(-1)"
        )
    return logprobs


def _token_rewards(
    mdp: TokenMDP, question: int, tokens: tuple[int, ...], terminated: bool
) -> list[float]:
    """Return the reward of each token, padded to the horizon."""
    reward = mdp.reward(question, tokens, terminated)
    if isinstance(reward, Sequence):
        rewards = [float(r) for r in reward]
    else:
        rewards = [0.0] * (len(tokens) - 1) + [float(reward)]
    if len(rewards) != len(tokens) or not all(abs(r) < torch.inf for r in rewards):
        raise ConfigurationError(
            f"the reward of tokens {tokens} to question {question} is {reward!r}: expected a "
            "finite number, or one for each token"
        )
    return rewards + [0.0] * (mdp.horizon - len(tokens))


def _padded(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    """Return rows as a tensor of shape (L, width), 0 at padding."""
    return torch.tensor([row + (0,) * (width - len(row)) for row in rows])
