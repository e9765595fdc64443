"""All wrappers together: in any order, at any grain, under both autoresets, around one slot."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
from episodes import EOS, ids, play
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import RecordEpisodeStatistics, TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from small_envs import token_envs

from lmrl_env.token_env import TokenEnv
from lmrl_env.wrappers import (
    DisagreementLog,
    FormatReward,
    LengthPenalty,
    OverlongPenalty,
    ProcessReward,
    PythonTool,
    RecordResponses,
    RepetitionPenalty,
    VerifierReward,
    WeightedRewards,
)

K = 48
RIGHT = "x\n</think> <answer>xxxx</answer>"


def by_lines(text, answer):
    return 0.25 * text.count("\n")


PAYING = {
    "format": lambda envs: FormatReward(envs, 0.5),
    "length": lambda envs: LengthPenalty(envs, 0.125),
    "repetition": lambda envs: RepetitionPenalty(envs, 2.0, ngram=2),
    "overlong": lambda envs: OverlongPenalty(envs, 16),
    "process": lambda envs: ProcessReward(envs, by_lines),
    "tool": PythonTool,
}
"""Wrappers whose rewards are sums of powers of two and ratios, in any order the same."""

GRADING = {
    "verifier": lambda envs: VerifierReward(envs, "scripted_scores:has_x"),
    "weighted": lambda envs: WeightedRewards(envs, {"y": ("scripted_scores:has_y", -1.0)}),
    "statistics": RecordEpisodeStatistics,
    "twice": lambda envs: TransformReward(envs, lambda rewards: 2 * rewards),
}


def stack(names, n=2, **kwargs):
    envs = token_envs(n, max_new_tokens=K, **{"tokens_per_step": K, "size": 5, **kwargs})
    for name in names:
        envs = (PAYING | GRADING)[name](envs)
    return envs


pieces = st.sampled_from(["x", "y", "\n", "</think>", "<answer>", "</answer>", "<python>", " "])
texts = st.lists(pieces, max_size=12).map("".join)


@given(
    st.tuples(texts, texts),
    st.permutations(list(PAYING)),
    st.integers(1, 5),
    st.sampled_from(["Disabled", "NextStep"]),
)
@settings(max_examples=25)
def test_order_grain_and_autoreset_leave_returns_and_infos_as_they_are(rows, order, k, autoreset):
    turns = [[[*ids(text), EOS]] for text in rows]
    expected, ends = play(stack(PAYING), *turns)
    other = stack(order, tokens_per_step=k, autoreset_mode=autoreset)
    returns, other_ends = play(other, *turns)
    assert returns == pytest.approx(expected, abs=1e-12)
    for one, two in zip(ends, other_ends, strict=True):
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key]) for key in one)


def test_a_sum_of_all_rewards_by_hand():
    tokens = ids(RIGHT)  # its last one completes the stop string
    n = len(tokens)
    pairs = list(itertools.pairwise(tokens))
    returns, (end, _) = play(stack([*PAYING, "verifier"]), [tokens], [[EOS]])
    by_hand = {
        "format": 0.5,
        "length": -0.125 * n / K,
        "repetition": -2.0 * (len(pairs) - len(set(pairs))) / len(pairs),
        "overlong": -max(0, n - 32) / 16,
        "process": 0.25,  # one line
        "verifier": 1.0,
    }
    assert returns[0] == pytest.approx(sum(by_hand.values()))
    assert returns[1] == pytest.approx(-0.125 / K)
    assert end["repetition_penalty"] == pytest.approx(by_hand["repetition"]) != 0
    assert end["verifier_status"] == "correct" and end["has_format"]


def test_gymnasiums_wrappers_stand_between_ours():
    # has_x pays 1, which is doubled; has_y takes 2; all is doubled again.
    envs = stack(["verifier", "twice", "weighted", "statistics", "twice"], 4)
    envs.reset(seed=0)
    actions = np.full((4, K), -1)
    for slot, text in enumerate(("xy", "x", "y", "")):
        actions[slot, : len(text) + 1] = [*ids(text), EOS]
    _, rewards, _, _, info = envs.step(actions)
    assert rewards.tolist() == [0, 4, -4, 0]
    assert info["episode"]["r"].tolist() == [0, 2, -2, 0]


def test_a_single_environment_pays_what_a_slot_does(tmp_path):
    def wrapped(n, k):
        envs = stack([*PAYING, "verifier"], n, tokens_per_step=k)
        envs = DisagreementLog(
            envs, "scripted_scores:has_x", "scripted_scores:has_y", tmp_path / "differ.jsonl"
        )
        return RecordResponses(envs, tmp_path / "all.jsonl")

    tokens = ids(RIGHT)  # its last one completes the stop string
    (expected,), (end,) = play(wrapped(1, K), [tokens])
    env = TokenEnv(wrapped(1, 1))
    env.reset(seed=0)
    total = 0.0
    for token in tokens:
        _, reward, terminated, truncated, info = env.step(token)
        total += reward
    assert terminated and not truncated
    assert total == pytest.approx(expected)
    assert info.keys() == end.keys()
    assert info["token_rewards"].tolist() == end["token_rewards"].tolist()
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2


def test_gymnasiums_checker_accepts_a_wrapped_environment():
    check_env(TokenEnv(stack(PAYING, 1, tokens_per_step=1)), skip_render_check=True)


def test_a_registered_id_takes_them_all():
    envs = gym.make_vec(
        "MathR1-v0",
        num_envs=2,
        questions="arithmetic:size=20",
        max_new_tokens=K,
        tokens_per_step=K,
        autoreset_mode="Disabled",
    )
    for wrap in PAYING.values():
        envs = wrap(envs)
    _, ends = play(envs, [[*ids(RIGHT), EOS]], [[EOS]])
    assert {"verifier_status", "has_format", "token_rewards", "tool_calls"} <= ends[0].keys()
    assert envs.spec.id == "MathR1-v0"
    envs.close()
