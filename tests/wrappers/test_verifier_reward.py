"""The wrapper that pays a verifier's score when a response ends."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from lmrl_env.errors import ConfigurationError
from lmrl_env.verifiers import boxed_math
from lmrl_env.wrappers import VerifierReward

ONGOING = (0.0, False, False, {})


def ends(response, answer="12", *, reward=0.0, truncated=False):
    """One slot's part of a step at which its response ends."""
    return reward, not truncated, truncated, {"response": response, "answer": answer}


class ScriptedVectorEnv(VectorEnv):
    """Plays steps that were written down: for each slot, reward, flags and info."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_observation_space = gym.spaces.Discrete(2)
    single_action_space = gym.spaces.Discrete(2)

    def __init__(self, *steps):
        self.num_envs = len(steps[0])
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, self.num_envs
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.steps = iter(steps)

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.num_envs, dtype=np.int64), {"seed": seed, "options": options}

    def step(self, actions):
        step = next(self.steps)
        info = {}
        for slot, (*_, slot_info) in enumerate(step):
            info = self._add_info(info, slot_info, slot)
        self.rewards, terminations, truncations = (
            np.array(x) for x in list(zip(*step, strict=True))[:3]
        )
        return (
            np.zeros(self.num_envs, dtype=np.int64),
            self.rewards,
            terminations,
            truncations,
            info,
        )


def step(*slots, **kwargs):
    """Play a single step through the wrapper; return rewards and info."""
    envs = VerifierReward(ScriptedVectorEnv(slots), boxed_math, **kwargs)
    _, rewards, _, _, info = envs.step(np.zeros(len(slots), dtype=np.int64))
    return rewards, info


def test_only_slots_that_end_are_paid_and_only_if_they_are_right():
    rewards, info = step(ONGOING, ends(r"\boxed{12}"), ends(r"\boxed{13}"), ends("12"))
    assert rewards.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert rewards.dtype == np.float64
    assert info["verifier_status"].tolist() == [None, "correct", "wrong", "unparseable"]
    assert info["verifier_extracted"].tolist() == [None, "12", "13", None]
    assert info["_verifier_status"].tolist() == [False, True, True, True]
    assert info["_verifier_extracted"].tolist() == [False, True, True, True]


def test_a_step_at_which_nothing_ends_is_passed_on_unchanged():
    rewards, info = step(ONGOING, (0.5, False, False, {}))
    assert rewards.tolist() == [0.0, 0.5]
    assert info == {}


def test_the_score_is_added_to_the_reward_and_the_environment_keeps_its_own():
    envs = ScriptedVectorEnv((ends(r"\boxed{12}", reward=0.5), (0.25, False, False, {})))
    rewards = VerifierReward(envs, boxed_math).step(np.zeros(2, dtype=np.int64))[1]
    assert rewards.tolist() == [1.5, 0.25]
    assert envs.rewards.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("truncated_reward", "reward", "status", "extracted"),
    [(0.0, 0.0, "truncated", None), (-0.5, -0.5, "truncated", None), (None, 1.0, "correct", "12")],
)
def test_a_truncated_response_earns_what_was_said(truncated_reward, reward, status, extracted):
    rewards, info = step(
        ends(r"\boxed{12} and", truncated=True),
        ends(r"\boxed{12}"),
        truncated_reward=truncated_reward,
    )
    assert rewards.tolist() == [reward, 1.0]
    assert info["verifier_status"].tolist() == [status, "correct"]
    assert info["verifier_extracted"].tolist() == [extracted, "12"]
    assert info["_verifier_status"].tolist() == [True, True]


def test_any_one_of_several_answers_is_paid():
    rewards, _ = step(ends(r"\boxed{13}", ("12", "13")), ends(r"\boxed{13}", ["12", "14"]))
    assert rewards.tolist() == [1.0, 0.0]


def test_every_step_is_graded_by_itself():
    envs = VerifierReward(
        ScriptedVectorEnv((ends(r"\boxed{12}"), ONGOING), (ONGOING, ends(r"\boxed{12}"))),
        boxed_math,
    )
    actions = np.zeros(2, dtype=np.int64)
    assert envs.step(actions)[1].tolist() == [1.0, 0.0]
    assert envs.step(actions)[1].tolist() == [0.0, 1.0]


def test_a_failing_verifier_is_reported_and_pays_nothing():
    envs = VerifierReward(
        ScriptedVectorEnv((ends("raise boom"), ends("compute"), ends("12"))),
        "scripted_verifiers:scripted",
        timeout=0.3,
    )
    _, rewards, _, _, info = envs.step(np.zeros(3, dtype=np.int64))
    assert rewards.tolist() == [0.0, 0.0, 1.0]
    assert info["verifier_status"].tolist() == ["crash", "timeout", "correct"]


def test_environments_with_the_same_verifier_share_its_workers():
    one = VerifierReward(ScriptedVectorEnv((ONGOING,)), boxed_math)
    two = VerifierReward(ScriptedVectorEnv((ends(r"\boxed{12}"),)), boxed_math)
    assert one.grader is two.grader
    one.close()
    assert two.step(np.zeros(1, dtype=np.int64))[1].tolist() == [1.0]


def test_reset_goes_through_with_its_arguments():
    envs = VerifierReward(ScriptedVectorEnv((ONGOING,)), boxed_math)
    options = {"question_ids": ["a"]}
    assert envs.reset(seed=3, options=options)[1] == {"seed": 3, "options": options}


@pytest.mark.parametrize("key", ["response", "answer"])
def test_an_environment_that_hides_the_response_is_an_error_that_names_the_slots(key):
    slot = ends(r"\boxed{12}")
    del slot[3][key]
    with pytest.raises(ConfigurationError, match=rf"slots \[0, 1\] ended and info\['{key}'\]"):
        step(ends(r"\boxed{12}"), slot)


def test_gymnasiums_own_wrappers_work_on_top():
    envs = gym.wrappers.vector.RecordEpisodeStatistics(
        VerifierReward(ScriptedVectorEnv((ends(r"\boxed{12}"), ONGOING)), boxed_math)
    )
    envs.reset()
    info = envs.step(np.zeros(2, dtype=np.int64))[4]
    assert info["episode"]["r"].tolist() == [1.0, 0.0]
