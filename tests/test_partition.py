"""The gradient does not depend on micro-batches, ranks, padding or the order of rows.

Run as a program, under torchrun, this file is one rank: it writes the gradients that the ranks
agree on to the file that it is given.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import VOCAB_SIZE, random_model
from test_batches import K, make_rollout
from torch import Tensor

from lmrl_env.batch_plan import BatchPlan
from lmrl_env.batches import MicroBatch, micro_batches
from lmrl_env.distributed import backward, micro_step, shutdown
from lmrl_env.importance import truncated_importance_weights
from lmrl_env.policy import Policy
from lmrl_env.rollout import Rollout
from lmrl_env.testing import assert_partition_invariant
from lmrl_env.types import BatchTotals

ROOT = Path(__file__).parents[1]
ALGORITHMS = {
    path.stem: importlib.import_module(f"algos.{path.stem}")
    for path in sorted((ROOT / "algos").glob("*.py"))
}
all_algorithms = pytest.mark.parametrize("name", ALGORITHMS)


def has_critic(algorithm) -> bool:
    return "values" in inspect.signature(algorithm.compute_advantages).parameters


def takes_reference(algorithm) -> bool:
    return "ref_logprobs" in inspect.signature(algorithm.policy_loss).parameters


# --- the algorithm files, by the public proof


@all_algorithms
@given(seed=st.integers(0, 2**31))
@settings(max_examples=3)
def test_the_loss_of_every_algorithm_file_is_partition_invariant(name, seed):
    algorithm = ALGORITHMS[name]
    assert_partition_invariant(
        algorithm.compute_advantages,
        algorithm.policy_loss,
        with_values=has_critic(algorithm),
        seed=seed,
    )


@pytest.mark.parametrize("name", [n for n, file in ALGORITHMS.items() if takes_reference(file)])
def test_a_kl_term_in_the_loss_is_partition_invariant(name):
    algorithm = ALGORITHMS[name]
    assert_partition_invariant(
        algorithm.compute_advantages,
        algorithm.policy_loss,
        loss_kwargs={"kl_coef": 0.1},
        with_reference=True,
    )


def test_reinforce_pp_is_partition_invariant_for_rewards_per_token():
    algorithm = ALGORITHMS["reinforce_pp"]

    def compute_advantages(rewards, group_size):
        per_token = rewards[:, None] * torch.linspace(0.1, 1.0, 7, dtype=rewards.dtype)
        return algorithm.compute_advantages(per_token, group_size)

    assert_partition_invariant(compute_advantages, algorithm.policy_loss)


def test_the_loss_of_the_critic_is_partition_invariant():
    def value_loss(values, old_values, returns, mask, totals):
        returns = returns if returns.dim() == 2 else returns[:, None]
        return ALGORITHMS["ppo"].value_loss(values, old_values, returns, mask, totals)

    assert_partition_invariant(ALGORITHMS["ppo"].compute_advantages, value_loss, with_values=True)


# --- a loss with one mistake each


def centred(rewards, group_size):
    groups = rewards.reshape(-1, group_size)
    return (groups - groups.mean(dim=1, keepdim=True)).reshape(-1)


def token_sum(logprobs, old_logprobs, advantages, mask):
    """Return -Aρ of each token, 0 where the mask is False."""
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    return -advantages * (logprobs - old_logprobs).exp() * mask


def right(logprobs, old_logprobs, advantages, mask, totals):
    losses = token_sum(logprobs, old_logprobs, advantages, mask)
    return losses.sum() / totals.tokens, {"tokens": mask.sum() / totals.tokens}


def divides_by_its_rows(logprobs, old_logprobs, advantages, mask, totals):
    return token_sum(logprobs, old_logprobs, advantages, mask).sum() / len(mask), {}


def divides_by_its_tokens(logprobs, old_logprobs, advantages, mask, totals):
    losses = token_sum(logprobs, old_logprobs, advantages, mask)
    return losses.sum() / mask.sum().clamp(min=1), {}


def divides_by_its_width(logprobs, old_logprobs, advantages, mask, totals):
    losses = token_sum(logprobs, old_logprobs, advantages, mask)
    return losses.sum() / (totals.responses * mask.shape[1]), {}


def divides_by_its_longest_response(logprobs, old_logprobs, advantages, mask, totals):
    losses = token_sum(logprobs, old_logprobs, advantages, mask)
    return losses.sum() / (totals.responses * mask.sum(1).max().clamp(min=1)), {}


def divides_by_no_tokens(logprobs, old_logprobs, advantages, mask, totals):
    losses = token_sum(logprobs, old_logprobs, advantages, mask)
    return (losses.sum(1) / mask.sum(1)).sum() / totals.responses, {}


def whitens_its_advantages(logprobs, old_logprobs, advantages, mask, totals):
    return right(logprobs, old_logprobs, advantages - advantages.mean(), mask, totals)


def takes_zeros_for_padding(logprobs, old_logprobs, advantages, mask, totals):
    return right(logprobs, old_logprobs, advantages, logprobs != 0, totals)


def forgets_the_mask_in_a_penalty(logprobs, old_logprobs, advantages, mask, totals):
    loss, metrics = right(logprobs, old_logprobs, advantages, mask, totals)
    return loss + (logprobs - old_logprobs).square().sum() / totals.tokens, metrics


def takes_lengths_for_the_mask(logprobs, old_logprobs, advantages, mask, totals):
    column = torch.arange(mask.shape[1])
    return right(logprobs, old_logprobs, advantages, column < mask.sum(1, keepdim=True), totals)


def discounts_by_column(logprobs, old_logprobs, advantages, mask, totals):
    losses = token_sum(logprobs, old_logprobs, advantages, mask)
    return (losses * 0.9 ** torch.arange(mask.shape[1])).sum() / totals.tokens, {}


def compares_with_the_row_before(logprobs, old_logprobs, advantages, mask, totals):
    return right(logprobs, old_logprobs, advantages - advantages.roll(1, 0), mask, totals)


def averages_a_metric(logprobs, old_logprobs, advantages, mask, totals):
    loss, _ = right(logprobs, old_logprobs, advantages, mask, totals)
    return loss, {"ratio": (logprobs - old_logprobs).detach().exp()[mask].mean()}


def leaves_a_metric_out(logprobs, old_logprobs, advantages, mask, totals):
    loss, metrics = right(logprobs, old_logprobs, advantages, mask, totals)
    return loss, metrics if len(mask) > 1 else {}


def adds_a_constant(logprobs, old_logprobs, advantages, mask, totals):
    loss, metrics = right(logprobs, old_logprobs, advantages, mask, totals)
    return loss + 1.0, metrics


def edits_the_old_logprobs(logprobs, old_logprobs, advantages, mask, totals):
    return right(logprobs, old_logprobs.clamp_(min=-1.0), advantages, mask, totals)


def edits_the_mask(logprobs, old_logprobs, advantages, mask, totals):
    mask[:, 0] = False
    return right(logprobs, old_logprobs, advantages, mask, totals)


def edits_the_advantages(logprobs, old_logprobs, advantages, mask, totals):
    advantages /= 2
    return right(logprobs, old_logprobs, advantages, mask, totals)


def loses_the_graph(logprobs, old_logprobs, advantages, mask, totals):
    return right(logprobs.detach(), old_logprobs, advantages, mask, totals)


def is_not_finite(logprobs, old_logprobs, advantages, mask, totals):
    return right(logprobs, old_logprobs, advantages / 0, mask, totals)


def test_a_right_loss_passes():
    assert_partition_invariant(centred, right)


@pytest.mark.parametrize(
    ("policy_loss", "message"),
    [
        (divides_by_its_rows, "micro-batches of 1 rows .* Divide by totals"),
        (divides_by_its_tokens, "micro-batches of 1 rows .* Divide by totals"),
        (divides_by_its_width, "wider padding .* width of the tensor"),
        (divides_by_its_longest_response, "micro-batches of 1 rows .* Divide by totals"),
        (divides_by_no_tokens, "an empty micro-batch more .* nan"),
        (whitens_its_advantages, "micro-batches of 1 rows .* gradient differs"),
        (takes_zeros_for_padding, "mask is False"),
        (forgets_the_mask_in_a_penalty, "mask is False"),
        (takes_lengths_for_the_mask, "padding on the left .* by its column"),
        (discounts_by_column, "padding on the left .* by its column"),
        (compares_with_the_row_before, "gradient differs"),
        (averages_a_metric, "shares of metric 'ratio' sum to"),
        (leaves_a_metric_out, "must give a share of every metric"),
        (adds_a_constant, "shares of the loss sum to .*, expected"),
        (edits_the_old_logprobs, "changed its argument 'old_logprobs' in place"),
        (edits_the_mask, "changed its argument 'mask' in place"),
        (edits_the_advantages, "changed its argument 'advantages' in place"),
        (loses_the_graph, "gradient of norm 0.0"),
        (is_not_finite, "gradient of norm nan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_loss_with_one_mistake_is_caught(policy_loss, message):
    with pytest.raises(AssertionError, match=re.compile(message, re.DOTALL)):
        assert_partition_invariant(centred, policy_loss)


def test_advantages_that_are_edited_in_place_are_caught():
    def edits_the_rewards(rewards, group_size):
        rewards -= rewards.mean()
        return rewards

    with pytest.raises(AssertionError, match="compute_advantages changed its argument 'rewards'"):
        assert_partition_invariant(edits_the_rewards, right)


def test_a_mistake_in_advantages_per_token_alone_is_caught():
    def averages_them(logprobs, old_logprobs, advantages, mask, totals):
        if advantages.dim() == 2:
            advantages = advantages.mean(dim=1)
        return right(logprobs, old_logprobs, advantages, mask, totals)

    with pytest.raises(AssertionError, match=re.escape("advantages of shape (12, 7)")):
        assert_partition_invariant(centred, averages_them)


def test_the_message_names_difference_scale_and_worst_parameter():
    def twice_in_small_ones(logprobs, old_logprobs, advantages, mask, totals):
        loss, metrics = right(logprobs, old_logprobs, advantages, mask, totals)
        return loss * (2 if len(mask) == 1 else 1), metrics

    expected = (
        r"^micro-batches of 1 rows \(float64, advantages of shape \(12,\)\): the gradient differs "
        r"from the whole batch's by 1 of its norm \(accepted: 1e-10\), most at \w+\[\d, \d\]: "
        r"(\S+), expected (\S+); its norm is 2 times the expected one; does the loss divide"
    )
    with pytest.raises(AssertionError, match=expected) as caught:
        assert_partition_invariant(centred, twice_in_small_ones)
    got, right_value = re.match(expected, str(caught.value)).groups()
    assert float(got) == pytest.approx(2 * float(right_value), rel=1e-4)


# --- the real machinery: a Transformers model, micro-batches and ranks

GROUP_SIZE, QUESTIONS, TEMPERATURE = 2, 6, 0.7
PROMPT_LENGTHS, RESPONSE_LENGTHS = [3, 5, 9, 2, 7, 4], [1, 6, 3, 2, 5, 5, 6, 1, 2, 4, 3, 6]
SEED, STEP = 0, 3  # the first update of this step has 2 and 1 questions, or 2, 1 and 0, of a rank
TIS_CAP, ENTROPY_COEF, KL_COEF = 1.05, 0.1, 0.1
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


class Problem:
    """The batch of all ranks, a policy, and old, reference and sampling log-probs off it."""

    def __init__(self, dtype: torch.dtype):
        self.batch: Rollout = make_rollout(PROMPT_LENGTHS, RESPONSE_LENGTHS, GROUP_SIZE)
        self.batch.mask[1, 3] = self.batch.mask[6, 2] = False  # inserted, as a tool's output is
        model = random_model("qwen2", dtype)
        with torch.no_grad():  # less sharp a policy rounds less in float32
            for parameter in model.parameters():
                parameter.mul_(0.5)
        self.policy = Policy(model, VOCAB_SIZE)
        random = torch.Generator().manual_seed(0)

        def noise() -> Tensor:
            return 0.2 * torch.randn(self.batch.mask.shape, generator=random).to(dtype)

        whole = self.micro_batch(np.arange(len(RESPONSE_LENGTHS)))
        with torch.no_grad():
            logprobs, _ = self.policy(whole.tokens, temperature=TEMPERATURE)
        self.old_logprobs = logprobs + noise()
        self.ref_logprobs = logprobs + noise()
        sampling_logprobs = self.old_logprobs + noise()
        self.weights = truncated_importance_weights(self.old_logprobs, sampling_logprobs, TIS_CAP)
        self.values = noise()

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        (micro,) = micro_batches(self.batch, [rows], GROUP_SIZE, "cpu")
        return micro

    def advantages(self, algorithm) -> Tensor:
        dtype = self.values.dtype
        if has_critic(algorithm):
            rewards = torch.from_numpy(self.batch.token_rewards).to(dtype)
            mask = torch.from_numpy(self.batch.mask)
            return algorithm.compute_advantages(rewards, self.values, mask)[0]
        return algorithm.compute_advantages(torch.from_numpy(self.batch.rewards), GROUP_SIZE)

    def share(self, policy, algorithm, micro, totals, with_terms) -> Tensor:
        """Return a micro-batch's share of the loss, with or without all that may be added to it."""

        def part(values: Tensor) -> Tensor:
            return values[micro.rows] if values.dim() == 1 else values[micro.rows, : micro.width]

        logprobs, entropy = policy(micro.tokens, temperature=TEMPERATURE, with_entropy=True)
        advantages, kwargs = self.advantages(algorithm), {}
        if with_terms:
            advantages = self.weights * advantages.reshape(len(self.weights), -1)
            if takes_reference(algorithm):
                kwargs = {"ref_logprobs": part(self.ref_logprobs), "kl_coef": KL_COEF}
        advantages = part(advantages).to(logprobs.dtype)
        loss, _ = algorithm.policy_loss(
            logprobs, part(self.old_logprobs), advantages, micro.mask, totals, **kwargs
        )
        if with_terms:
            loss = loss - ENTROPY_COEF * (entropy * micro.mask).sum() / totals.tokens
        return loss

    def gradient(
        self, policy, algorithm, micros, totals, accelerator, *, with_terms=False, backward=backward
    ) -> Tensor:
        self.policy.zero_grad()
        for micro in micros:
            with micro_step(accelerator, policy, micro.last):
                loss = self.share(policy, algorithm, micro, totals, with_terms)
                backward(accelerator, loss)
        return self.flat_gradient()

    def flat_gradient(self) -> Tensor:
        return torch.cat([parameter.grad.ravel() for parameter in self.policy.parameters()])


def key(name: str, with_terms: bool, dtype: torch.dtype) -> str:
    return f"{name}{' with all terms' * with_terms}, {dtype}"


def gradients_of_the_ranks(accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the gradients of one update, on which the ranks agree, and this rank's share of it."""
    plan = BatchPlan(
        accelerator,
        questions=QUESTIONS,
        group_size=GROUP_SIZE,
        updates=2,
        epochs=1,
        max_tokens=14,
        seed=SEED,
    )
    first = plan.first_group * GROUP_SIZE
    rows = next(plan.minibatches(STEP))
    results = {}
    for dtype in TOLERANCE:
        problem = Problem(dtype)
        policy = accelerator.prepare(problem.policy)
        own = problem.batch.take(first + np.arange(plan.groups * GROUP_SIZE))
        totals = plan.totals(own, rows)
        micros = [m._replace(rows=m.rows + first) for m in plan.micro_batches(own, rows)]

        gradient = functools.partial(problem.gradient, policy, accelerator=accelerator)
        for name, algorithm in ALGORITHMS.items():
            for with_terms in (False, True):
                results[key(name, with_terms, dtype)] = gradient(
                    algorithm, micros, totals, with_terms=with_terms
                )
        rloo = ALGORITHMS["rloo"]
        forgetful = BatchTotals(max(1, len(rows)), max(1, int(own.mask[rows].sum())), K)
        results[f"totals of one rank, {dtype}"] = gradient(rloo, micros, forgetful)
        results[f"mean over ranks, {dtype}"] = gradient(
            rloo, micros, totals, backward=Accelerator.backward
        )
        results["tokens of micro-batches"] = torch.tensor([int(m.mask.sum()) for m in micros])
        del policy
    return results


def main(path: str) -> None:
    """Be one rank."""
    accelerator = Accelerator(cpu=True)
    torch.save(gradients_of_the_ranks(accelerator), f"{path}.{accelerator.process_index}")
    shutdown(accelerator)


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory) -> list[dict[str, Tensor]]:
    """Return what each of a number of ranks says."""
    if request.param == 1:
        accelerator = Accelerator(cpu=True)
        results = gradients_of_the_ranks(accelerator)
        shutdown(accelerator)
        return [results]
    path = tmp_path_factory.mktemp("ranks") / "gradients"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, *launch, __file__, str(path)],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    return [torch.load(f"{path}.{rank}") for rank in range(request.param)]


def numbers_of_ranks(*numbers):
    return pytest.mark.parametrize("ranks", numbers, indirect=True, scope="module")


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Return the same gradients, each by one plain backward pass over the rows of all ranks."""
    groups = np.random.default_rng((SEED, STEP, 0)).permutation(QUESTIONS)[: QUESTIONS // 2]
    rows = (groups[:, None] * GROUP_SIZE + np.arange(GROUP_SIZE)).ravel()
    results = {}
    for dtype in TOLERANCE:
        problem = Problem(dtype)
        micro = problem.micro_batch(rows)
        mask = torch.from_numpy(problem.batch.mask[rows, : micro.width])
        micro = micro._replace(mask=mask)
        totals = BatchTotals(len(rows), int(problem.batch.mask[rows].sum()), K)
        for name, algorithm in ALGORITHMS.items():
            for with_terms in (False, True):
                problem.policy.zero_grad()
                problem.share(problem.policy, algorithm, micro, totals, with_terms).backward()
                results[key(name, with_terms, dtype)] = problem.flat_gradient()
    return results


def difference(got: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 1e-4
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@numbers_of_ranks(1, 2, 3)
def test_any_number_of_ranks_has_the_gradient_of_one_plain_pass(ranks, expected):
    assert len(expected) == 4 * len(ALGORITHMS)
    for name, gradient in expected.items():
        tolerance = TOLERANCE[torch.float64 if "float64" in name else torch.float32]
        assert difference(ranks[0][name], gradient) <= tolerance, name


@pytest.mark.slow
@numbers_of_ranks(2, 3)
def test_ranks_with_unequal_shares_are_what_was_tested(ranks):
    tokens = [rank["tokens of micro-batches"].tolist() for rank in ranks]
    assert len({len(counts) for counts in tokens}) == 1  # as many micro-batches on every rank
    assert len({sum(counts) for counts in tokens}) == len(ranks)
    assert any(0 in counts for counts in tokens)  # an empty micro-batch
    assert len(ranks) < 3 or any(sum(counts) == 0 for counts in tokens)  # a rank without rows


@pytest.mark.slow
@numbers_of_ranks(2, 3)
@pytest.mark.parametrize("mistake", ["totals of one rank", "mean over ranks"])
def test_a_rank_that_is_forgotten_shows_in_the_gradient(ranks, expected, mistake):
    right_gradient = expected[key("rloo", False, torch.float64)]
    assert difference(ranks[0][f"{mistake}, torch.float64"], right_gradient) > 0.1


if __name__ == "__main__":
    main(sys.argv[1])
