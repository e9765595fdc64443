"""Token MDPs small enough to enumerate, and the policies that act in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lmrl_env.errors import ConfigurationError
from lmrl_env.types import Question
from lmrl_env.verifiers import Verifier

Reward = Callable[[int, tuple[int, ...], bool], float | Sequence[float]]
"""``(question, tokens, terminated) -> reward``: one number, paid with the last token, or one for
each token."""


class TokenPolicy(Protocol):
    """A distribution over the next token in every state."""

    def __call__(self, question: int, prefix: tuple[int, ...], /) -> Tensor:
        """Return the log-probabilities of the next token.

        Args:
            question: index of the question.
            prefix: the tokens that have followed it so far.

        Returns:
            Shape (V,), float64, nats; -inf for a token that is never sampled in this state.
        """


class TrainablePolicy(TokenPolicy, Protocol):
    """A policy with parameters, such as an ``nn.Module``."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters in the order in which gradients are laid out flat."""


@dataclass(frozen=True)
class TokenMDP:
    """Generation of text as a Markov decision process, with a reward that can be tabulated.

    A state is a question and the tokens so far, an action the next token, the transition its
    concatenation. A response *terminates* with EOS, which is an action like any other, and is
    *truncated* after ``horizon`` tokens (Liu et al. 2025, arXiv:2503.20783, section 2).

    Args:
        vocab_size: V, at least 1.
        horizon: K, the token budget of a response, at least 1.
        reward: of a whole response.
        eos: id of the token that ends a response; None if only the budget does.
        question_probs: probability of each question; their number is that of the questions.

    Raises:
        ConfigurationError: for sizes, an EOS or probabilities that make no MDP.
    """

    vocab_size: int
    horizon: int
    reward: Reward
    eos: int | None = None
    question_probs: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.horizon < 1:
            raise ConfigurationError(
                f"vocab_size={self.vocab_size}, horizon={self.horizon}: expected at least 1 each"
            )
        if self.eos is not None and not 0 <= self.eos < self.vocab_size:
            raise ConfigurationError(
                f"eos={self.eos} is no token of a vocabulary of {self.vocab_size}: expected an id "
                f"from 0 to {self.vocab_size - 1}, or None"
            )
        total = math.fsum(self.question_probs)
        if min(self.question_probs, default=-1.0) < 0 or not math.isclose(total, 1, abs_tol=1e-12):
            raise ConfigurationError(
                f"question_probs={self.question_probs} sum to {total}: expected probabilities, one "
                "for each question, that sum to 1"
            )


def verifier_reward(
    verifier: Verifier,
    questions: Sequence[Question],
    token_texts: Sequence[str],
    *,
    truncated_reward: float | None = 0.0,
) -> Reward:
    r"""Return the reward of a verifier: its score of the response's text.

    Args:
        verifier: judges the text.
        questions: with their gold answers, in the order of the MDP's.
        token_texts: text of each token id, ``""`` for EOS.
        truncated_reward: what a truncated response earns instead of its score; None grades it like
            any other, as in ``lmrl_env.wrappers.VerifierReward``.

    >>> from lmrl_env.verifiers import boxed_math
    >>> reward = verifier_reward(boxed_math, [Question("0", "1+1?", "2")], [r"\boxed{2}", ""])
    >>> reward(0, (0, 1), True), reward(0, (1,), True), reward(0, (0, 0), False)
    (1.0, 0.0, 0.0)
    """

    def reward(question: int, tokens: tuple[int, ...], terminated: bool) -> float:
        if not terminated and truncated_reward is not None:
            return truncated_reward
        row = questions[question]
        text = "".join(token_texts[token] for token in tokens)
        return verifier(text, row.answer, question=row).score

    return reward


class TabularPolicy(nn.Module):
    """A softmax over free logits in every state: the policy that can be anything.

    Args:
        mdp: whose states have a row of logits each.
        seed: of the logits, drawn from a normal distribution.
        scale: its standard deviation; 0 is the uniform policy.

    Attributes:
        logits: parameter, shape (S, V), float64.
        states: mapping from (question, prefix) to a row.
    """

    def __init__(self, mdp: TokenMDP, seed: int = 0, scale: float = 1.0):
        super().__init__()
        going_on = [token for token in range(mdp.vocab_size) if token != mdp.eos]
        self.states = {
            (question, prefix): row
            for row, (question, prefix) in enumerate(
                (question, prefix)
                for question in range(len(mdp.question_probs))
                for length in range(mdp.horizon)
                for prefix in itertools.product(going_on, repeat=length)
            )
        }
        noise = torch.randn(
            len(self.states),
            mdp.vocab_size,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(seed),
        )
        self.logits = nn.Parameter(scale * noise)

    def forward(self, question: int, prefix: tuple[int, ...]) -> Tensor:
        """Return the log-probabilities of the next token, shape (V,)."""
        return self.logits[self.states[question, prefix]].log_softmax(-1)
