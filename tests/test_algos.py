"""The nine algorithm files: what they share, what they promise, and their values by hand."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import re
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from algos_files import (
    ALGORITHMS,
    BY_GROUP,
    HALF_STEPS,
    NAMES,
    ROOT,
    WITH_EPS,
    WITHOUT_CRITIC,
    each,
    file_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import make_rollout

from lmrl_env.errors import ConfigurationError
from lmrl_env.types import BatchTotals

log, sqrt = math.log, math.sqrt
F64 = {"dtype": torch.float64}

# --- what the files share

MARK = re.compile(r"# --- shared (?P<name>.*): (?P<end>begin|end)")
REGIONS = {"args", "setup", "rollout", "update", "step", "log", "end"}


def shared_regions(name):
    """Return the lines of each shared region of a file."""
    regions, region = {}, None
    for line in file_of(name).read_text().splitlines():
        mark = MARK.fullmatch(line.strip())
        assert mark or "--- shared" not in line, line
        if mark and mark["end"] == "begin":
            assert region is None and mark["name"] not in regions, line
            region = mark["name"]
            regions[region] = [line]
        elif mark:
            assert region == mark["name"], line
            regions[region].append(line)
            region = None
        elif region is not None:
            regions[region].append(line)
    assert region is None
    return regions


def test_these_are_all_the_files():
    assert sorted(path.stem for path in (ROOT / "algos").glob("*.py")) == sorted(NAMES)


@each(*NAMES, *HALF_STEPS)
def test_shared_regions_are_the_same_in_every_file(name):
    regions = shared_regions(name)
    assert regions.keys() == REGIONS
    for region, lines in regions.items():
        assert len(lines) > 4
        assert lines == shared_regions("dr_grpo")[region]


@each(*NAMES, *HALF_STEPS)
def test_a_file_is_short_and_imports_no_other(name):
    source = file_of(name).read_text()
    assert len(source.splitlines()) <= (395 if name == "ppo" else 345)
    for node in ast.walk(ast.parse(source)):
        imported = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
        imported.append(getattr(node, "module", "") or "")
        assert not {*NAMES, *HALF_STEPS, "algos"} & {
            part for name in imported for part in name.split(".")
        }


@each(*NAMES, *HALF_STEPS)
def test_importing_a_file_does_nothing_else(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.rand(1)  # so that the state is not one fresh from a seed
    random_state, path = torch.get_rng_state(), list(sys.path)
    accelerate_state = dict(AcceleratorState._shared_state)
    spec = importlib.util.spec_from_file_location("fresh", file_of(name))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh", module)
    spec.loader.exec_module(module)
    assert not list(tmp_path.iterdir()) and sys.path == path
    assert not torch.distributed.is_initialized()
    assert AcceleratorState._shared_state == accelerate_state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capfd.readouterr() == ("", "")


@each(*NAMES)
def test_a_file_keeps_the_contract_of_its_two_functions(name):
    algorithm = ALGORITHMS[name]
    advantages = inspect.signature(algorithm.compute_advantages).parameters
    loss = inspect.signature(algorithm.policy_loss).parameters
    first = ("rewards", "values", "mask") if name == "ppo" else ("rewards", "group_size")
    options = {"gamma": 1.0, "gae_lambda": 1.0} if name == "ppo" else {}
    options |= {"eps": 1e-4} if name in WITH_EPS else {}
    assert positional(advantages) == first and keyword_only(advantages) == options
    assert positional(loss) == ("logprobs", "old_logprobs", "advantages", "mask", "totals")
    low, high = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28), "cispo": (1.0, 0.2)}.get(
        name, (0.2, 0.2)
    )
    options = {"clip_eps_low": low, "clip_eps_high": high}
    options |= {"ref_logprobs": None, "kl_coef": 0.0} if name == "grpo" else {}
    assert keyword_only(loss) == options
    args = vars(algorithm.Args())
    assert {key: args[key] for key in options if key in args} == {
        key: value for key, value in options.items() if key != "ref_logprobs"
    }


def positional(parameters):
    return tuple(k for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)


def keyword_only(parameters):
    return {k: p.default for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


# --- advantages by hand

# Two groups of three: (1, 0, 0) of mean 1/3 and variance (4 + 1 + 1) / 9 / 2 = 1/3, and
# (2, 1/2, -1) of mean 1/2 and variance (9/4 + 9/4) / 2 = 9/4.
# All six: mean 5/12, squares 25/4, variance (25/4 - 6 · 25/144) / 5 = 25/24.
REWARDS = [1.0, 0.0, 0.0, 2.0, 0.5, -1.0]
STD = 5 / sqrt(24)
ABOVE_MEAN = [2 / 3, -1 / 3, -1 / 3, 3 / 2, 0.0, -3 / 2]
STANDARDISED = [2 / sqrt(3), -1 / sqrt(3), -1 / sqrt(3), 1.0, 0.0, -1.0]
ADVANTAGES = {
    "dr_grpo": ABOVE_MEAN,
    "rloo": [1.0, -1 / 2, -1 / 2, 2 + 1 / 4, 0.0, -1 - 5 / 4],
    **dict.fromkeys(("grpo", "dapo", "gspo", "cispo"), STANDARDISED),
    "lite_ppo": [a / STD for a in (2 / 3, -1 / 3, -1 / 3, 3 / 2, 0, -3 / 2)],
    "reinforce_pp": [a / STD for a in (7 / 12, -5 / 12, -5 / 12, 19 / 12, 1 / 12, -17 / 12)],
}


def advantages_of(name, rewards, group_size=3, **kwargs):
    if name in WITH_EPS:
        kwargs = {"eps": 0.0, **kwargs}
    return ALGORITHMS[name].compute_advantages(rewards, group_size, **kwargs)


@each(*WITHOUT_CRITIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_are_those_by_hand_and_of_the_rewards_dtype(name, dtype):
    rewards = torch.tensor(REWARDS, dtype=dtype)
    advantages = advantages_of(name, rewards)
    assert advantages.dtype == dtype and advantages.shape == (6,)
    assert advantages.tolist() == pytest.approx(ADVANTAGES[name], rel=1e-6, abs=1e-7)
    assert rewards.tolist() == REWARDS


@each("cispo", "dapo", "gspo", "grpo")
def test_eps_is_added_to_the_std_of_the_group(name):
    advantages = advantages_of(name, torch.tensor(REWARDS[3:], **F64), eps=0.5)
    assert advantages.tolist() == pytest.approx([3 / 4, 0, -3 / 4])  # 1.5 / (1.5 + 0.5)


@each("lite_ppo", "reinforce_pp")
def test_eps_is_added_to_the_std_of_the_batch(name):
    advantages = advantages_of(name, torch.tensor(REWARDS, **F64), eps=0.5)
    expected = [a * STD / (STD + 0.5) for a in ADVANTAGES[name]]
    assert advantages.tolist() == pytest.approx(expected)


@each(*WITHOUT_CRITIC)
def test_equal_rewards_that_no_float_holds_give_next_to_no_advantage(name):
    rewards = torch.full((8,), 0.1, dtype=torch.float32)
    advantages = ALGORITHMS[name].compute_advantages(rewards, 8)  # at the default eps
    assert advantages.abs().max() < 1e-3


def test_reinforce_pp_gives_a_token_the_reward_still_to_come_by_statistics_of_whole_responses():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, -1.0], [0.0, 0.0, 0.0]], **F64)
    # Returns 1, -1/2, 0: mean 1/6, variance (5/4 - 3 · 1/36) / 2 = 7/12.
    to_go = [[1, 1, 1], [-1 / 2, -1, -1], [0, 0, 0]]
    expected = (torch.tensor(to_go, **F64) - 1 / 6) / sqrt(7 / 12)
    advantages = ALGORITHMS["reinforce_pp"].compute_advantages(rewards, 3, eps=0.0)
    assert torch.allclose(advantages, expected, rtol=1e-12, atol=0)
    assert rewards[1].tolist() == [0.5, 0.0, -1.0]


def test_a_kl_coefficient_without_a_reference_is_refused():
    tensor = torch.zeros(1, 1)
    totals = BatchTotals(1, 1, 1)
    with pytest.raises(ConfigurationError, match=re.escape("kl_coef=0.3 needs ref_logprobs")):
        ALGORITHMS["grpo"].policy_loss(tensor, tensor, tensor, tensor.bool(), totals, kl_coef=0.3)


@each("rloo", "reinforce_pp")
def test_a_penalty_takes_the_log_ratio_of_actions_from_the_reward(name):
    # log(π_old/π_ref) of the tokens: log 2, (no action), -log 4 in the first; log 3 in the second.
    old = torch.tensor([[-1.0, 5.0, -1 - log(4)], [-0.5, 3.0, 9.0]], **F64)
    ref = torch.tensor([[-1 - log(2), -2.0, -1.0], [-0.5 - log(3), -7.0, 2.0]], **F64)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    per_token = [[-0.1 * log(2), 0.0, 1 + 0.1 * log(4)], [0.5 - 0.1 * log(3), 0.0, 0.0]]
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, 0.0]], **F64)
    if name == "rloo":
        rewards, per_token = rewards.sum(1), [sum(row) for row in per_token]
    before = rewards.clone()
    penalized = ALGORITHMS[name].penalize(rewards, old, ref, mask, 0.1)
    assert torch.allclose(penalized, torch.tensor(per_token, **F64), rtol=1e-12)
    assert torch.equal(rewards, before)


@each(*BY_GROUP)
@pytest.mark.parametrize(
    ("shape", "group_size"), [((5,), 2), ((4,), 1), ((4,), 0), ((0,), 2), ((4, 2), 2)]
)
def test_rewards_that_form_no_groups_are_refused(name, shape, group_size):
    message = f"rewards of shape {shape} do not form groups of group_size={group_size}"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ALGORITHMS[name].compute_advantages(torch.zeros(shape), group_size)


@each(*BY_GROUP)
def test_a_run_with_groups_of_one_is_refused(name):
    with pytest.raises(ConfigurationError, match=re.escape("--group-size 1: expected at least 2")):
        ALGORITHMS[name].Args(group_size=1)


@each("ppo", "reinforce_pp")
def test_groups_of_one_are_no_matter_where_nothing_is_compared_within_them(name):
    assert ALGORITHMS[name].Args(group_size=1).group_size == 1


def test_reinforce_pp_refuses_a_batch_of_one_response():
    with pytest.raises(ConfigurationError, match="rewards of 1 responses: expected at least 2"):
        ALGORITHMS["reinforce_pp"].compute_advantages(torch.zeros(1), 1)


# --- laws of advantages


@st.composite
def grouped_rewards(draw):
    """Rewards of up to four groups in float64, not all of a group equal; and their group size."""
    group_size = draw(st.integers(2, 5))
    groups = draw(
        st.lists(
            st.lists(st.integers(-8, 8), min_size=group_size, max_size=group_size).filter(
                lambda group: len(set(group)) > 1
            ),
            min_size=1,
            max_size=4,
        )
    )
    return torch.tensor(groups, **F64).reshape(-1) / 4, group_size


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@each(*WITHOUT_CRITIC)
@given(batch=grouped_rewards(), shift=st.integers(-40, 40), scale=st.sampled_from([0.25, 3.0]))
@settings(max_examples=20)
def test_a_shift_of_all_rewards_changes_nothing_and_a_scale_at_most_the_scale(
    name, batch, shift, scale
):
    rewards, group_size = batch
    advantages = advantages_of(name, rewards, group_size)
    assert close(advantages_of(name, rewards + shift, group_size), advantages)
    scaled = advantages_of(name, rewards * scale, group_size)
    assert close(scaled, advantages if name in WITH_EPS else advantages * scale)


@each(*WITHOUT_CRITIC)
@given(batch=grouped_rewards(), data=st.data())
@settings(max_examples=20)
def test_advantages_sum_to_zero_and_follow_a_permutation_of_their_group(name, batch, data):
    rewards, group_size = batch
    advantages = advantages_of(name, rewards, group_size)
    sums = advantages.reshape(-1, group_size).sum(1)
    if name == "reinforce_pp":  # which compares with the whole batch
        sums = advantages.sum()
    assert sums.abs().max() < 1e-9
    order = torch.arange(len(rewards))
    order[:group_size] = torch.tensor(data.draw(st.permutations(range(group_size))))
    assert close(advantages_of(name, rewards[order], group_size), advantages[order])


@each("dr_grpo", "rloo", "grpo", "dapo", "gspo", "cispo")
@given(batch=grouped_rewards())
@settings(max_examples=20)
def test_an_advantage_does_not_depend_on_the_other_groups(name, batch):
    rewards, group_size = batch
    alone = [advantages_of(name, group, group_size) for group in rewards.split(group_size)]
    assert close(torch.cat(alone), advantages_of(name, rewards, group_size))


@given(batch=grouped_rewards())
@settings(max_examples=20)
def test_the_advantage_of_rloo_is_that_of_dr_grpo_times_g_over_g_less_one(batch):
    rewards, g = batch
    assert close(
        advantages_of("rloo", rewards, g), advantages_of("dr_grpo", rewards, g) * g / (g - 1)
    )


@given(batch=grouped_rewards(), width=st.integers(1, 4))
@settings(max_examples=20)
def test_reinforce_pp_by_token_begins_with_the_advantage_of_the_response(batch, width):
    rewards, g = batch
    tokens = torch.zeros(len(rewards), width, **F64)
    tokens[:, -1] = rewards
    by_token = advantages_of("reinforce_pp", tokens, g)
    assert close(by_token, advantages_of("reinforce_pp", rewards, g)[:, None].expand_as(tokens))


# --- the loss by hand

# Three responses of an optimiser step of six with ten tokens and a budget of eight. The second has
# a token that was no action; what stands at such places is not to be looked at.
TOTALS = BatchTotals(responses=6, tokens=10, max_new_tokens=8)
MASK = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 1], [1, 1, 0, 0]]).bool()
P = [[1 / 2, 9, 9, 9], [1 / 4, 9, 3 / 8, 1 / 2], [1 / 4, 11 / 40, 9, 9]]
P_OLD = [[1 / 3, 2, 2, 2], [1 / 2, 2, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 2, 2]]
# Ratios      3/2           1/2       3/2  1           1/2  11/10
A = [1.0, -2.0, 0.5]
A_TOKENS = [[1.0, 9, 9, 9], [-2.0, 9, 4.0, 1.0], [-0.5, 0.5, 9, 9]]
CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.25}


def share(name, advantages=A, **kwargs):
    """Return loss, gradient at the log-probs and metrics of the three responses."""
    logprobs = torch.tensor(P, **F64).log().requires_grad_()
    old_logprobs = torch.tensor(P_OLD, **F64).log().requires_grad_()
    loss, metrics = ALGORITHMS[name].policy_loss(
        logprobs, old_logprobs, torch.tensor(advantages, **F64), MASK, TOTALS, **kwargs
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert not any(value.requires_grad for value in metrics.values())
    return loss.item(), gradient, {key: value.item() for key, value in metrics.items()}


def fractions(low, high):
    return {"policy/clip_fraction_low": low, "policy/clip_fraction_high": high}


# min(ratio · A, clip(ratio) · A) by response; the slope is ratio · A where the ratio is chosen.
#   3/2 → 5/4 clipped
#   -1 → -8/5 clipped, -3 (min keeps the ratio), -2
#   1/4 (min keeps the ratio), 11/20
TERMS = [5 / 4, -8 / 5 - 3 - 2, 1 / 4 + 11 / 20]
SLOPES = torch.tensor([[0, 0, 0, 0], [0, 0, -3, -2], [1 / 4, 11 / 20, 0, 0]], **F64)
# By token: 5/4 clipped; -8/5 clipped, 6 → 5 clipped, 1; -1/4 → -2/5 clipped, 11/20.
TOKEN_TERMS = [5 / 4, -8 / 5 + 5 + 1, -2 / 5 + 11 / 20]
TOKEN_SLOPES = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 11 / 20, 0, 0]], **F64)
LENGTHS = [1, 3, 2]
DIVISORS = {  # of each response
    **dict.fromkeys(("dr_grpo", "ppo", "reinforce_pp"), [6 * 8] * 3),
    "grpo": [6 * 1, 6 * 3, 6 * 2],
    "rloo": [6] * 3,
    **dict.fromkeys(("dapo", "lite_ppo"), [10] * 3),
}


@each(*DIVISORS)
@pytest.mark.parametrize(
    ("advantages", "terms", "slopes", "low", "high"),
    [(A, TERMS, SLOPES, 0.1, 0.1), (A_TOKENS, TOKEN_TERMS, TOKEN_SLOPES, 0.2, 0.2)],
    ids=["by_response", "by_token"],
)
def test_the_clipped_loss_is_that_by_hand(name, advantages, terms, slopes, low, high):
    loss, gradient, metrics = share(name, advantages, **CLIP)
    divisors = DIVISORS[name]
    assert loss == pytest.approx(-sum(t / d for t, d in zip(terms, divisors, strict=True)))
    assert close(gradient, -slopes / torch.tensor(divisors, **F64)[:, None])
    assert metrics == pytest.approx(fractions(low, high))


@each(*DIVISORS)
def test_the_default_clip_is_the_one_of_the_signature(name):
    high = 0.28 if name == "dapo" else 0.2
    loss, _, _ = share(name)
    terms = [1 + high, *TERMS[1:]]
    expected = -sum(t / d for t, d in zip(terms, DIVISORS[name], strict=True))
    assert loss == pytest.approx(expected)


def test_the_divergence_in_the_loss_of_grpo_is_that_by_hand():
    # π_ref/π is 1/2 | 2, 1, 4 | 1, 1 and k3 = π_ref/π - 1 - log(π_ref/π), by log π 1 - π_ref/π.
    ref = torch.tensor([[1 / 4, 5, 5, 5], [1 / 2, 5, 3 / 8, 2], [1 / 4, 11 / 40, 5, 5]], **F64)
    loss, gradient, metrics = share("grpo", **CLIP, ref_logprobs=ref.log(), kl_coef=0.3)
    k3 = [1 / 2 - 1 + log(2), (2 - 1 - log(2)) + 0 + (4 - 1 - log(4)), 0.0]
    terms = [t - 0.3 * k for t, k in zip(TERMS, k3, strict=True)]
    assert loss == pytest.approx(-(terms[0] + terms[1] / 3 + terms[2] / 2) / 6)
    k3_slopes = torch.tensor([[1 / 2, 0, 0, 0], [-1, 0, 0, -3], [0, 0, 0, 0]], **F64)
    lengths = torch.tensor(LENGTHS, **F64)[:, None]
    assert close(gradient, -(SLOPES - 0.3 * k3_slopes) / lengths / 6)
    assert metrics == pytest.approx({**fractions(0.1, 0.1), "policy/ref_kl": sum(k3) / 10})


# Ratios of the responses: 3/2, (1/2 · 3/2 · 1)^(1/3), (1/2 · 11/10)^(1/2) = 0.74.
S = [3 / 2, (3 / 4) ** (1 / 3), sqrt(11 / 20)]


def test_gspo_clips_a_whole_response_as_by_hand():
    # 3/2 → 5/4 clipped; the second is within the range; min keeps the third, which is below it.
    loss, gradient, metrics = share("gspo", A, **CLIP)
    assert loss == pytest.approx(-(5 / 4 - 2 * S[1] + S[2] / 2) / 6)
    slopes = torch.tensor([0, -2 * S[1] / 3, S[2] / 2 / 2], **F64)[:, None]
    assert close(gradient, -slopes / 6 * MASK)
    assert metrics == pytest.approx(fractions(0.0, 0.1))

    # With the signs turned round min keeps the first, and the third is clipped to 4/5.
    loss, gradient, metrics = share("gspo", [-1.0, 2.0, -0.5], **CLIP)
    assert loss == pytest.approx(-(-3 / 2 + 2 * S[1] - 2 / 5) / 6)
    slopes = torch.tensor([-3 / 2, 2 * S[1] / 3, 0], **F64)[:, None]
    assert close(gradient, -slopes / 6 * MASK)
    assert metrics == pytest.approx(fractions(0.2, 0.0))  # both tokens of the third


def test_gspo_by_token_averages_over_the_response_and_moves_each_token_by_its_own_advantage():
    # First: 5/4 clipped. Second: s · (-2 + 4 + 1) / 3. Third: s < 4/5, so that its first token
    # (A = -1/2) is clipped to -2/5 and its second (A = 1/2) stays s/2.
    loss, gradient, metrics = share("gspo", A_TOKENS, **CLIP)
    assert loss == pytest.approx(-(5 / 4 + S[1] + (-2 / 5 + S[2] / 2) / 2) / 6)
    slopes = [
        [0, 0, 0, 0],
        [-2 * S[1] / 3, 0, 4 * S[1] / 3, S[1] / 3],
        [0, S[2] / 2 / 2, 0, 0],
    ]
    assert close(gradient, -torch.tensor(slopes, **F64) / 6)
    assert metrics == pytest.approx(fractions(0.1, 0.1))


def test_gspo_clips_by_its_own_narrow_range_unless_told():
    loss, _, _ = share("gspo")
    assert loss == pytest.approx(-(1.0004 - 2 * 0.9997 + S[2] / 2) / 6)
    loss, _, _ = share("gspo", [-1.0, 2.0, -0.5])
    assert loss == pytest.approx(-(-3 / 2 + 2 * S[1] - 0.9997 / 2) / 6)


@pytest.mark.parametrize(
    ("low", "weights", "low_fraction"),
    [
        (1.0, [[5 / 4, 0, 0, 0], [1 / 2, 0, 5 / 4, 1], [1 / 2, 11 / 10, 0, 0]], 0.0),
        (0.2, [[5 / 4, 0, 0, 0], [4 / 5, 0, 5 / 4, 1], [4 / 5, 11 / 10, 0, 0]], 0.2),
    ],
)
def test_cispo_weighs_the_log_probs_and_clipped_tokens_keep_their_gradient(
    low, weights, low_fraction
):
    loss, gradient, metrics = share("cispo", clip_eps_low=low, clip_eps_high=0.25)
    w = weights
    total = w[0][0] * log(1 / 2)
    total += -2 * (w[1][0] * log(1 / 4) + w[1][2] * log(3 / 8) + w[1][3] * log(1 / 2))
    total += 0.5 * (w[2][0] * log(1 / 4) + w[2][1] * log(11 / 40))
    assert loss == pytest.approx(-total / 10)
    assert close(gradient, -torch.tensor(w, **F64) * torch.tensor(A, **F64)[:, None] / 10)
    assert metrics == pytest.approx(fractions(low_fraction, 0.2))


def test_cispo_has_no_bound_below_unless_told():
    tiny = torch.tensor([[1e-9]], **F64).log().requires_grad_()
    loss, _ = ALGORITHMS["cispo"].policy_loss(
        tiny, torch.zeros(1, 1, **F64), torch.ones(1, **F64), torch.tensor([[True]]), TOTALS
    )
    (gradient,) = torch.autograd.grad(loss, tiny)
    assert gradient.item() == pytest.approx(-1e-9 / 10, rel=1e-6)


# --- laws of the loss


@st.composite
def responses(draw, dtype=torch.float64):
    """Log-probs, old log-probs, advantages, mask with holes, all as tensors of (n, K) or (n,)."""
    n, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logprobs = -3 * torch.rand(n, width, generator=generator, **F64)
    old_logprobs = logprobs + 0.4 * torch.randn(n, width, generator=generator, **F64)
    mask = torch.rand(n, width, generator=generator) < 0.7
    mask[:, 0] = True
    advantages = torch.randn(n, generator=generator, **F64)
    return logprobs.to(dtype), old_logprobs.to(dtype), advantages.to(dtype), mask


def loss_and_gradient(name, logprobs, old_logprobs, advantages, mask, totals=TOTALS, **kwargs):
    logprobs = logprobs.clone().requires_grad_()
    loss, metrics = ALGORITHMS[name].policy_loss(
        logprobs, old_logprobs, advantages, mask, totals, **kwargs
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, metrics


def same_share(one, other):
    return (
        close(one[0], other[0])
        and close(one[1], other[1])
        and all(close(one[2][key], other[2][key]) for key in one[2])
    )


@each(*NAMES)
@given(batch=responses())
@settings(max_examples=20)
def test_one_advantage_a_response_is_the_same_as_that_advantage_for_each_token(name, batch):
    logprobs, old, advantages, mask = batch
    by_token = advantages[:, None].expand_as(mask)
    assert same_share(
        loss_and_gradient(name, logprobs, old, advantages, mask),
        loss_and_gradient(name, logprobs, old, by_token, mask),
    )


@each(*NAMES)
@given(batch=responses(), garbage=st.sampled_from([-50.0, -1.0, 0.0, 20.0]))
@settings(max_examples=20)
def test_what_stands_where_there_was_no_action_changes_nothing(name, batch, garbage):
    logprobs, old, advantages, mask = batch
    advantages = advantages[:, None].expand_as(mask)
    kwargs = {"ref_logprobs": old - 0.1, "kl_coef": 0.1} if name == "grpo" else {}
    clean = loss_and_gradient(name, logprobs, old, advantages, mask, **kwargs)
    if kwargs:
        kwargs["ref_logprobs"] = torch.where(mask, old - 0.1, -garbage)
    dirty = [
        torch.where(mask, values, torch.full_like(values, noise))
        for values, noise in ((logprobs, garbage), (old, garbage / 2), (advantages, garbage))
    ]
    assert same_share(clean, loss_and_gradient(name, *dirty, mask, **kwargs))
    assert (clean[1][~mask] == 0).all()


@each(*NAMES)
@given(batch=responses())
@settings(max_examples=10)
def test_a_row_without_actions_adds_nothing(name, batch):
    logprobs, old, advantages, mask = batch
    whole = loss_and_gradient(name, logprobs, old, advantages, mask)
    more = loss_and_gradient(
        name,
        torch.cat([logprobs, logprobs[:1]]),
        torch.cat([old, old[:1]]),
        torch.cat([advantages, advantages[:1]]),
        torch.cat([mask, torch.zeros_like(mask[:1])]),
    )
    assert (more[1][-1] == 0).all()
    assert same_share(whole, (more[0], more[1][:-1], more[2]))


@each(*NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
@settings(max_examples=5)
def test_inputs_are_left_alone_and_the_loss_has_their_dtype(name, dtype, data):
    logprobs, old, advantages, mask = data.draw(responses(dtype))
    inputs = (logprobs, old, advantages, mask)
    before = [value.clone() for value in inputs]
    loss, gradient, _ = loss_and_gradient(name, *inputs)
    assert loss.dtype == gradient.dtype == dtype and loss.dim() == 0
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@each(*NAMES)
@given(batch=responses())
@settings(max_examples=10)
def test_the_totals_alone_say_what_the_sum_is_divided_by(name, batch):
    loss, gradient, metrics = loss_and_gradient(name, *batch)
    twice = BatchTotals(12, 20, 8)
    half = loss_and_gradient(name, *batch, totals=twice)
    assert same_share((loss / 2, gradient / 2, {k: v / 2 for k, v in metrics.items()}), half)
    longer = loss_and_gradient(name, *batch, totals=TOTALS._replace(max_new_tokens=16))
    by_budget = name in ("dr_grpo", "ppo", "reinforce_pp")
    assert close(longer[0], loss / 2 if by_budget else loss)


@each("dapo", "gspo", "grpo", "dr_grpo", "lite_ppo", "ppo", "reinforce_pp", "rloo")
@given(batch=responses())
@settings(max_examples=10)
def test_clipping_never_makes_the_loss_smaller(name, batch):
    free = {"clip_eps_low": 1.0, "clip_eps_high": 1e9}
    clipped = loss_and_gradient(name, *batch)[0]
    assert clipped >= loss_and_gradient(name, *batch, **free)[0] - 1e-12


# --- PPO


def test_generalised_advantages_are_those_by_hand():
    # γ = 0.9 and γλ = 0.45. First, three actions up to the budget, with a token in between that
    # was none; nothing is bootstrapped behind it:
    #   δ = 0.9 · 0.4 - 0.2 = 0.16,  0.9 · 0.5 - 0.4 = 0.05,  1 - 0.5 = 0.5
    #   A = 0.16 + 0.45 · 0.275,     0.05 + 0.45 · 0.5 = 0.275,  0.5
    # Second, one action. Third, rewards 0.5 and 1: A = 0.5 + 0.9 · 0.2 - 0.1 + 0.45 · 0.8, 0.8.
    rewards = torch.tensor([[0.0, 0, 0, 1], [-1.0, 0, 0, 0], [0.5, 1, 0, 0]], **F64)
    values = torch.tensor([[0.2, 7, 0.4, 0.5], [0.3, 9, 9, 9], [0.1, 0.2, -9, 9]], **F64)
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    inputs = [rewards.clone(), values.clone(), mask.clone()]
    advantages, returns = ALGORITHMS["ppo"].compute_advantages(
        rewards, values, mask, gamma=0.9, gae_lambda=0.5
    )
    expected = [[0.28375, 0, 0.275, 0.5], [-1.3, 0, 0, 0], [0.94, 0.8, 0, 0]]
    assert close(advantages, torch.tensor(expected, **F64))
    expected = [[0.48375, 0, 0.675, 1.0], [-1.0, 0, 0, 0], [1.04, 1.0, 0, 0]]
    assert close(returns, torch.tensor(expected, **F64))
    assert all(torch.equal(a, b) for a, b in zip(inputs, (rewards, values, mask), strict=True))


@st.composite
def critics(draw, dtype=torch.float64):
    """Rewards (at actions only), values and a mask with holes."""
    n, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(n, width, generator=generator) < 0.6
    rewards = torch.randn(n, width, generator=generator, dtype=dtype) * mask
    return rewards, torch.randn(n, width, generator=generator, dtype=dtype), mask


@given(critic=critics())
@settings(max_examples=40)
def test_at_lambda_one_the_advantage_is_the_reward_to_come_less_the_value(critic):
    rewards, values, mask = critic
    advantages, returns = ALGORITHMS["ppo"].compute_advantages(rewards, values, mask)
    for i, t in mask.nonzero().tolist():
        to_come = sum(rewards[i, t:].tolist())
        assert returns[i, t].item() == pytest.approx(to_come, abs=1e-12)
        assert advantages[i, t].item() == pytest.approx(to_come - values[i, t].item(), abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


@given(critic=critics(), gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
@settings(max_examples=40)
def test_the_advantage_is_the_discounted_sum_of_later_differences(critic, gamma, gae_lambda):
    rewards, values, mask = critic
    advantages, _ = ALGORITHMS["ppo"].compute_advantages(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    for i in range(len(mask)):
        actions = mask[i].nonzero()[:, 0].tolist()
        r, v = rewards[i, actions].tolist(), [*values[i, actions].tolist(), 0.0]
        for t, action in enumerate(actions):
            expected = sum(
                (gamma * gae_lambda) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s])
                for s in range(t, len(actions))
            )
            assert advantages[i, action].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generalised_advantages_have_the_dtype_of_the_rewards(dtype):
    rewards, mask = torch.ones(1, 2, dtype=dtype), torch.tensor([[True, False]])
    for result in ALGORITHMS["ppo"].compute_advantages(rewards, rewards / 2, mask):
        assert result.dtype == dtype


def test_the_loss_of_the_critic_is_that_by_hand():
    # V_old = 0, clip at ±0.2, the larger of the two errors counts; half its square:
    #   R =  1: V = 0.5 → 0.2, 0.64/2, no gradient; V = -0.5 stays, 2.25/2; V = 0.1 stays, 0.81/2
    #   R = -1: V = -0.5 → -0.2, 0.64/2, no gradient; then two tokens that were no actions
    values = torch.tensor([[0.5, -0.5, 0.1], [-0.5, 6.0, 7.0]], **F64).requires_grad_()
    returns = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 8.0, 9.0]], **F64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    old = torch.zeros(2, 3, **F64)
    loss, metrics = ALGORITHMS["ppo"].value_loss(values, old, returns, mask, TOTALS)
    assert loss.item() == pytest.approx((0.64 + 2.25 + 0.81 + 0.64) / 2 / 10)
    (gradient,) = torch.autograd.grad(loss, values)
    assert close(gradient, torch.tensor([[0, -1.5, -0.9], [0, 0, 0]], **F64) / 10)
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(
        {"critic/loss": loss.item(), "critic/clip_fraction": 0.3}
    )
    # 0.5 and -0.5 are within 0.6 of V_old: errors 0.5, 1.5, 0.9, 0.5.
    wide, metrics = ALGORITHMS["ppo"].value_loss(values, old, returns, mask, TOTALS, value_clip=0.6)
    assert wide.item() == pytest.approx((0.25 + 2.25 + 0.81 + 0.25) / 2 / 10)
    assert metrics["critic/clip_fraction"] == 0 and not metrics["critic/loss"].requires_grad


def test_values_are_clipped_around_the_old_ones_not_around_zero():
    values = torch.tensor([[3.5]], **F64).requires_grad_()
    old, returns = torch.tensor([[3.0]], **F64), torch.tensor([[4.0]], **F64)
    mask = torch.tensor([[True]])
    loss, _ = ALGORITHMS["ppo"].value_loss(values, old, returns, mask, TOTALS)
    assert loss.item() == pytest.approx(0.64 / 2 / 10)  # 3.5 → 3.2, 0.8 from 4


# --- DAPO's sampling


def groups_of_two(*rewards):
    """A batch of groups of two; question i asks for group i."""
    batch = make_rollout([3] * len(rewards), [2] * (2 * len(rewards)), 2)
    return batch._replace(
        rewards=np.array(rewards, dtype=np.float64).ravel(),
        question_ids=np.repeat(np.arange(len(rewards)), 2),
    )


def test_dapo_counts_the_groups_whose_rewards_differ():
    batch = groups_of_two((1, 0), (1, 1), (0.1, 0.1 + 1e-9), (-1, -0.5))
    assert ALGORITHMS["dapo"].informative_groups(batch, 2) == 2


def test_dapo_takes_informative_groups_in_the_order_of_sampling_and_fills_up_with_the_others():
    batch = groups_of_two((1, 1), (1, 0), (0, 0), (0.5, 0), (0, 1))
    choose = ALGORITHMS["dapo"].choose_groups
    assert choose(batch, 2, 2).question_ids.tolist() == [1, 1, 3, 3]
    chosen = choose(batch, 4, 2)
    assert chosen.question_ids.tolist() == [1, 1, 3, 3, 4, 4, 0, 0]
    assert chosen.rewards.tolist() == [1, 0, 0.5, 0, 0, 1, 1, 1]
    assert len(batch.rewards) == 10
