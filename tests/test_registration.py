from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import (
    ClipReward,
    NormalizeReward,
    RecordEpisodeStatistics,
    TransformReward,
)

import lmrl_env
from lmrl_env.errors import ConfigurationError, ModelError, PromptTooLongError, UnknownNameError
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.wrappers import VerifierReward

IDS = ("MathR1-v0", "MathQwen-v0", "MathPlain-v0")
SMALL = {"questions": "arithmetic:size=20", "max_new_tokens": 8}
TOKENIZER = load_tokenizer("tiny")
EOS = TOKENIZER.eos_token_ids[0]


def make_vec(env_id="MathR1-v0", num_envs=4, **kwargs):
    return gym.make_vec(env_id, num_envs=num_envs, **{**SMALL, **kwargs})


def correct_response(envs, slot):
    """Return the tokens of a right answer to the slot's question, in the template's format."""
    base = envs.unwrapped
    answer = base.prompts.questions[base._question_id[slot]].answer
    text = {
        "tag": f"</think> <answer>{answer}</answer>",
        "boxed": rf"\boxed{{{answer}}}",
        "either": rf"\boxed{{{answer}}}",
    }[base.template.answer_format]
    return [*TOKENIZER.encode(text), EOS]


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_check_env_passes_without_a_warning(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, **SMALL).unwrapped)


@pytest.mark.parametrize("env_id", IDS)
def test_a_right_answer_earns_one_and_a_wrong_one_nothing(env_id):
    envs = make_vec(env_id, 2, max_new_tokens=48, tokens_per_step=48, autoreset_mode="Disabled")
    envs.reset(seed=0)
    right = correct_response(envs, 0)
    wrong = [*TOKENIZER.encode(r"</think> <answer>12345</answer> \boxed{12345}"), EOS]
    actions = np.array([(row + [-1] * 48)[:48] for row in (right, wrong)])
    _, rewards, terminated, _, info = envs.step(actions)
    assert terminated.all()
    assert rewards.tolist() == [1.0, 0.0]
    assert info["verifier_status"].tolist() == ["correct", "wrong"]


@pytest.mark.parametrize(("truncated_reward", "paid"), [(0.0, 0.0), (-0.5, -0.5), (None, 1.0)])
def test_truncated_reward_says_what_a_cut_off_response_earns(truncated_reward, paid):
    envs = make_vec("MathQwen-v0", 1, max_new_tokens=24, truncated_reward=truncated_reward)
    envs.reset(seed=0)
    script = correct_response(envs, 0)[:-1]
    script = [*script, *TOKENIZER.encode("x") * 24][:24]
    for token in script:
        _, rewards, terminated, truncated, _ = envs.step(np.array([token]))
    assert truncated[0] and not terminated[0]
    assert rewards[0] == paid


def test_a_verifier_gets_the_whole_row_of_the_question():
    base = lmrl_env.make_token_vector_env(2, **SMALL)
    envs = VerifierReward(base, "scripted_verifiers:pays_for_the_row", workers=1)
    envs.reset(seed=0)
    assert envs.step(np.array([EOS, EOS]))[1].tolist() == [1.0, 1.0]
    envs.grader.close()


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_make_vec_in_sync_mode_equals_the_vector_env_under_random_actions(env_id, tokens_per_step):
    ours = make_vec(env_id, 3, tokens_per_step=tokens_per_step)
    sync = make_vec(env_id, 3, tokens_per_step=tokens_per_step, vectorization_mode="sync")
    assert ours.observation_space == sync.observation_space
    assert ours.action_space == sync.action_space
    assert data_equivalence(ours.reset(seed=7), sync.reset(seed=7))
    ours.action_space.seed(1)
    random = np.random.default_rng(0)
    ends = 0
    for _ in range(60):
        actions = ours.action_space.sample()
        actions[random.random(actions.shape) < 0.1] = EOS
        mine, theirs = ours.step(actions), sync.step(actions)
        assert data_equivalence(mine, theirs)
        ends += int((mine[2] | mine[3]).sum())
    assert ends > 10


def test_gymnasiums_vector_wrappers_work_unchanged():
    envs = RecordEpisodeStatistics(make_vec(num_envs=2, max_new_tokens=48))
    envs = ClipReward(TransformReward(envs, lambda r: 3 * r), max_reward=2.0)
    envs.reset(seed=0)
    script = correct_response(envs, 0)
    for step in range(48):
        token = script[step] if step < len(script) else EOS
        _, rewards, terminated, _, info = envs.step(np.array([token, EOS if step else 5]))
        if terminated[0]:
            break
    assert rewards[0] == 2.0
    assert info["episode"]["r"][0] == 1.0
    assert info["episode"]["l"][0] == step + 1
    normalized = NormalizeReward(make_vec(num_envs=2))
    normalized.reset(seed=0)
    assert np.isfinite(normalized.step(np.array([5, EOS]))[1]).all()


def test_episode_statistics_follow_a_reset_mask():
    envs = RecordEpisodeStatistics(make_vec(num_envs=2, autoreset_mode="Disabled"))
    envs.reset(seed=0)
    for actions in ([5, 5], [EOS, 5]):
        envs.step(np.array(actions))
    envs.reset(options={"reset_mask": np.array([True, False])})
    info = envs.step(np.array([5, EOS]))[4]
    assert info["episode"]["l"].tolist() == [0, 3]


def test_the_spec_survives_json_and_makes_the_same_environment():
    envs = make_vec(
        num_envs=4, group_size=2, autoreset_mode="Disabled", truncated_reward=None, engine="local"
    )
    text = envs.spec.to_json()
    json.loads(text)
    again = gym.make_vec(EnvSpec.from_json(text))
    assert again.num_envs == 4 and again.unwrapped.group_size == 2
    assert again.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert data_equivalence(again.reset(seed=3), envs.reset(seed=3))
    actions = np.array([EOS] * 4)
    assert data_equivalence(again.step(actions), envs.step(actions))


def test_an_outside_agent_learns_from_the_environment_without_an_adapter():
    from stable_baselines3 import PPO

    env = gym.make("MathPlain-v0", questions="arithmetic:level=1,size=5", max_new_tokens=4)
    agent = PPO("MultiInputPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu")
    agent.learn(total_timesteps=32)
    assert agent.num_timesteps == 32


def test_the_engine_is_built_at_first_use_and_writes_what_the_environment_takes():
    envs = make_vec(num_envs=1, engine="local", tokens_per_step=8, autoreset_mode="Disabled")
    assert envs.unwrapped._engine is None
    observations, _ = envs.reset(seed=0)
    prompt = observations["input_ids"][0, : observations["length"][0]].tolist()
    (completion,) = envs.unwrapped.engine.generate([prompt], lmrl_env.Sampling(8), 1, [0])
    actions = np.full((1, 8), -1)
    actions[0, : len(completion.token_ids)] = completion.token_ids
    _, _, terminated, truncated, _ = envs.step(actions)
    assert terminated[0] or truncated[0]
    envs.close()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"template": "r2"}, UnknownNameError, "unknown template 'r2': expected one of"),
        ({"engine": "sglang"}, UnknownNameError, "unknown engine 'sglang': expected one of"),
        ({"model": "no/such"}, ModelError, "cannot load the tokenizer of the model name 'no/such'"),
        ({"max_new_tokens": 8190}, PromptTooLongError, "fits: the shortest has 130 tokens"),
    ],
)
def test_names_and_sizes_that_cannot_be_are_refused(kwargs, error, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=re.escape(message)):
        make_vec(**kwargs)


def test_a_single_environment_has_no_groups_and_no_autoreset():
    with pytest.raises(ConfigurationError, match=re.escape("use gymnasium.make_vec")):
        gym.make("MathR1-v0", group_size=8)


def test_importing_the_package_leaves_torch_and_vllm_out():
    code = (
        "import sys, lmrl_env, gymnasium as gym\n"
        "assert 'MathR1-v0' in gym.registry\n"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
