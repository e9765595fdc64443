"""A random ragged batch and the ways to cut it, for ``assert_partition_invariant``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmrl_env.types import BatchTotals

GROUPS, GROUP_SIZE = 4, 3
BUDGET, LONGEST, VOCAB_SIZE = 9, 7, 5

OWN_COUNT = (
    "does the loss divide by a count of its own micro-batch, such as mask.sum(), len(logprobs) or "
    ".mean()? Divide by totals, which count the whole optimiser step"
)
OWN_WIDTH = (
    "does the loss divide by the width of the tensor, as .mean() over padding does? Divide by "
    "totals.max_new_tokens or totals.tokens"
)
NO_TOKENS = (
    "does the loss divide by 0 tokens, or read places where the mask is False? A micro-batch whose "
    "mask is False everywhere must add nothing"
)
OWN_PLACE = "does the loss read a place by its column or its row? Only the mask says what counts"
NO_MASK = (
    "does the loss read places where the mask is False, or take them for padding by their value? "
    "Multiply by the mask"
)


class Cut(NamedTuple):
    """One way to cut the batch into micro-batches and to lay them out.

    Attributes:
        name: in messages.
        parts: rows of each micro-batch. One without rows becomes a row whose mask is False
            everywhere, as a rank gets that has fewer micro-batches than another.
        hint: the usual cause of a difference.
        padding: columns beyond the longest response of the batch; None trims each micro-batch to
            its own longest.
        right_aligned: whether padding stands on the left.
        garbage: whether masked places hold finite nonsense, instead of 0 at padding.
    """

    name: str
    parts: tuple[Tensor, ...]
    hint: str
    padding: int | None = 0
    right_aligned: bool = False
    garbage: bool = False


class RaggedPolicy(nn.Module):
    """Next-token log-probs from the question and the token before, by parameters that rows share.

    The reference, if there is one, is another of these without gradient.
    """

    def __init__(self, generator: torch.Generator, dtype: torch.dtype):
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(values.to(dtype))

        self.question = parameter(GROUPS, 3)
        self.token = parameter(VOCAB_SIZE, 3)
        self.head = parameter(3, VOCAB_SIZE)

    def forward(self, questions: Tensor, tokens: Tensor) -> Tensor:
        """Return the log-probs of tokens (n, K) in response to questions (n,)."""
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        states = torch.tanh(self.question[questions][:, None] + self.token[before])
        return (states @ self.head).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


class RaggedBatch:
    """A random ragged batch, and a policy near the one that wrote it.

    Responses have 1 to ``LONGEST`` tokens, fewer than the budget. Some have a token inside that is
    state and no action. The rewards of the first group are all equal.
    """

    def __init__(self, seed: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.size = GROUPS * GROUP_SIZE
        shape = (self.size, LONGEST)
        self.policy = RaggedPolicy(generator, dtype)
        self.questions = torch.arange(GROUPS).repeat_interleave(GROUP_SIZE)
        self.tokens = torch.randint(VOCAB_SIZE, shape, generator=generator)
        self.lengths = torch.randint(1, LONGEST + 1, (self.size,), generator=generator)
        self.lengths[:2] = torch.tensor([1, LONGEST])
        column = torch.arange(LONGEST)
        self.mask = column < self.lengths[:, None]
        inserted = (column > 0) & (column < self.lengths[:, None] - 1)
        self.mask &= ~(inserted & (torch.rand(shape, generator=generator) < 0.3))
        self.mask[1, 2] = False  # in the longest response, whatever the seed
        self.rewards = torch.randint(0, 4, (self.size,), generator=generator).to(dtype)
        self.rewards[:GROUP_SIZE] = 1.0
        self.rewards[-2:] = torch.tensor([0.0, 3.0], dtype=dtype)
        self.values = normal(*shape) * self.mask
        with torch.no_grad():
            off_policy = 0.3 * normal(*shape)
            off_policy[-2:] = 0.0  # no clip is so tight that nothing is left to compare
            self.old_logprobs = self.policy(self.questions, self.tokens) + off_policy
            self.ref_logprobs = RaggedPolicy(generator, dtype)(self.questions, self.tokens)
        self.importance_weights = (0.3 * normal(*shape)).exp().clamp(max=1.5)
        self.totals = BatchTotals(self.size, int(self.mask.sum()), BUDGET)
        self.garbage = normal(self.size, 2 * LONGEST)

    def micro_batch(self, cut: Cut, part: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Return what the loss gets of some rows, laid out as the cut says."""
        rows = part if len(part) else torch.tensor([self.size - 1])
        lengths = self.lengths[rows, None]
        width = int(lengths.max()) if cut.padding is None else LONGEST + cut.padding
        column = torch.arange(width) - (width - lengths if cut.right_aligned else 0 * lengths)
        inside = (column >= 0) & (column < lengths)
        source = column.clamp(0, LONGEST - 1)  # (n, width)
        mask = self.mask[rows].gather(1, source) & inside & bool(len(part))
        shown = mask if cut.garbage else inside
        rest = self.garbage[rows, :width] * cut.garbage

        def laid_out(values: Tensor, rest: Tensor = rest) -> Tensor:
            return torch.where(shown, values.gather(1, source), rest)

        # Nonsense among the log-probs has a gradient too: to read it must show.
        anchor = torch.stack([parameter.mean() for parameter in self.policy.parameters()]).sum()
        logprobs = self.policy(self.questions[rows], self.tokens[rows])
        own = advantages[rows]
        return {
            "logprobs": laid_out(logprobs, rest * (1 + anchor)),
            "old_logprobs": laid_out(self.old_logprobs[rows]),
            "advantages": laid_out(own) if own.dim() == 2 else own,
            "mask": mask,
            "ref_logprobs": laid_out(self.ref_logprobs[rows]),
        }


def cuts(size: int, seed: int) -> Iterator[Cut]:
    """Yield the ways to cut a batch of so many rows; the seed draws the uneven ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(size)

    def shuffled() -> Tensor:
        return torch.randperm(size, generator=generator)

    def uneven(rows: Tensor) -> tuple[Tensor, ...]:
        ends = 1 + torch.randperm(size - 1, generator=generator)[:3]
        return rows.tensor_split(ends.sort().values)

    for n in range(1, size + 1):
        yield Cut(f"micro-batches of {n} rows", rows.split(n), OWN_COUNT)
    for _ in range(3):
        parts = uneven(rows)
        sizes = [len(part) for part in parts]
        yield Cut(f"micro-batches of {sizes} rows", parts, OWN_COUNT)
    yield Cut("an empty micro-batch more", (rows, rows[:0]), NO_TOKENS)
    yield Cut("shuffled rows", (shuffled(),), OWN_PLACE)
    yield Cut("wider padding", (rows,), OWN_WIDTH, padding=5)
    yield Cut("micro-batches trimmed to their longest response", uneven(rows), OWN_WIDTH, None)
    yield Cut("padding on the left", (rows,), OWN_PLACE, right_aligned=True)
    yield Cut("other values where the mask is False", (rows,), NO_MASK, garbage=True)
    yield Cut(
        "all of these at once", uneven(shuffled()), OWN_COUNT, 3, right_aligned=True, garbage=True
    )
