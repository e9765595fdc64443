"""A Python interpreter in the middle of a response."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from algos_files import ALGORITHMS, NAMES, each
from episodes import EOS, TOKENIZER, ids, play
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given, settings
from hypothesis import strategies as st
from small_envs import token_envs

from lmrl_env.batches import micro_batches
from lmrl_env.env import NO_TOKEN
from lmrl_env.errors import ConfigurationError
from lmrl_env.policy import Policy, load_model
from lmrl_env.rollout import rollout
from lmrl_env.types import BatchTotals, Completion
from lmrl_env.wrappers import PythonTool, VerifierReward

K = 96
CALL = "<python>print(6 * 7)</python>"
OUTPUT = "\n<output>\n42\n</output>\n"


def tool_envs(n=1, *, k=K, budget=K, base=None, **kwargs):
    base = {"template": "none"} | (base or {})
    envs = token_envs(n, max_new_tokens=budget, tokens_per_step=k, **base)
    return PythonTool(envs, **kwargs)


def response(envs, slot=0):
    return TOKENIZER.decode(envs.unwrapped.response(slot)[0])


def write(envs, *texts):
    """Take one step in which every slot writes a text, and return what it gives."""
    actions = np.full((envs.num_envs, envs.unwrapped.tokens_per_step), NO_TOKEN)
    for slot, text in enumerate(texts):
        tokens = ids(text)
        actions[slot, : len(tokens)] = tokens
    return envs.step(actions)


def shown(envs, program, **kwargs):
    """Return what a program's output looks like in the response."""
    envs = tool_envs(**kwargs) if envs is None else envs
    envs.reset(seed=0)
    write(envs, f"<python>{program}</python>")
    return response(envs).removeprefix(f"<python>{program}</python>")


# --- a call


def test_the_output_of_a_call_follows_it_and_is_state_but_not_action():
    envs = tool_envs()
    envs.reset(seed=0)
    observations, rewards, terminated, truncated, info = write(envs, "I ask " + CALL)
    assert not rewards.any() and not terminated.any() and not truncated.any() and not info
    assert response(envs) == "I ask " + CALL + OUTPUT
    _, is_action = envs.unwrapped.response(0)
    asked = len(ids("I ask " + CALL))
    assert is_action.tolist() == [True] * asked + [False] * len(ids(OUTPUT))
    start, stop = envs.unwrapped.prompts.width, observations["length"][0]
    assert TOKENIZER.decode(observations["input_ids"][0, :stop]).endswith(CALL + OUTPUT)
    assert not observations["input_ids"][0, stop:].any() and stop > start - K


def test_what_the_policy_wrote_behind_a_call_is_ignored():
    envs = tool_envs()
    envs.reset(seed=0)
    tokens = ids(CALL) + ids("\n<output>\n41\n</output>") + [EOS]
    actions = np.array([(tokens + [NO_TOKEN] * K)[:K]])
    assert not envs.step(actions)[2].any()
    assert response(envs) == CALL + OUTPUT


def test_a_response_may_call_several_times_and_counts_its_calls():
    envs = tool_envs(2)
    _, ends = play(envs, [ids(CALL), [*ids("<python>print(1)</python>"), EOS], [EOS]], [[EOS]])
    assert ends[0]["response"] == (
        CALL + OUTPUT + "<python>print(1)</python>" + OUTPUT.replace("42", "1")
    )
    assert [end["tool_calls"] for end in ends] == [2, 0]


def test_slots_call_side_by_side_and_the_others_are_left_alone():
    envs = tool_envs(3)
    envs.reset(seed=0)
    write(envs, "<python>print(1)</python>", "no call", "<python>print(2)</python>")
    after = [response(envs, slot) for slot in range(3)]
    assert "\n1\n" in after[0] and after[1] == "no call" and "\n2\n" in after[2]


@pytest.mark.parametrize(
    "text",
    [
        "<python>print(1)",
        "print(1)</python>",
        "<python>print(1)</python",
        "<python>print(1)</ python>",
    ],
)
def test_a_call_that_is_not_closed_or_not_opened_is_text(text):
    envs = tool_envs()
    envs.reset(seed=0)
    write(envs, text)
    write(envs, ".")
    assert response(envs) == text + "."


def test_a_stray_tag_does_not_hide_the_call_that_follows():
    envs = tool_envs()
    envs.reset(seed=0)
    write(envs, "a </python> ignored: the step ends with the tag")
    write(envs, "b <python> c ")
    write(envs, CALL)
    assert response(envs) == "a </python>b <python> c " + CALL + OUTPUT


def test_an_output_with_tags_calls_nothing_and_ends_nothing():
    program = "print('<' + '/answer> <' + 'python>print(1)<' + '/python>')"
    envs = tool_envs(base={"template": "r1"}, budget=128, k=128)
    envs.reset(seed=0)
    write(envs, f"<python>{program}</python>")
    before = response(envs)
    assert "</answer> <python>print(1)</python>\n</output>" in before
    _, _, terminated, _, _ = write(envs, ">")  # could complete a tag, were the output its own
    assert not terminated.any() and response(envs) == before + ">"


def test_special_tokens_in_an_output_are_text():
    assert TOKENIZER.decode([EOS]) == "<|endoftext|>"
    envs = tool_envs()
    assert shown(envs, "print('<' + '|endoftext|>')") == OUTPUT.replace("42", "<|endoftext|>")
    assert EOS not in envs.unwrapped.response(0)[0]


# --- what the model is shown


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print(1)\nx = [\n", "SyntaxError: '[' was never closed"),
        ("print(1); nothing", "1\nNameError: name 'nothing' is not defined"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("", ""),
        ("print()", ""),
        ("while 1: 0", "stopped after 0.2 seconds"),
    ],
)
def test_errors_are_shown_to_the_model(program, output):
    assert shown(None, program, timeout=0.2) == f"\n<output>\n{output}\n</output>\n"


def test_a_long_output_loses_its_middle_and_keeps_the_error_at_its_end():
    text = shown(None, "print('ab' * 200); q", max_output_tokens=40, budget=128, k=128)
    inside = text.removeprefix("\n<output>\n").removesuffix("\n</output>\n")
    assert len(ids(inside)) == pytest.approx(40, abs=1)  # cut between tokens, which may merge
    assert inside.startswith("abab") and "b\n...\n" in inside
    assert inside.endswith("'q' is not defined")


def test_other_tags_and_another_format_can_be_named():
    envs = tool_envs(opening="```python\n", closing="\n```", output_format=" -> {output};")
    envs.reset(seed=0)
    write(envs, "```python\nprint(5)\n```")
    assert response(envs) == "```python\nprint(5)\n``` -> 5;"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"opening": ""}, "opening='', closing='</python>'"),
        ({"closing": ""}, "expected tags that are not empty"),
        ({"output_format": "none"}, "and a format with {output} once"),
        ({"max_output_tokens": 3}, "max_output_tokens=3"),
        ({"timeout": 0}, "timeout=0"),
        ({"memory_limit": 0}, "positive seconds and bytes"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_bad_arguments_are_refused_by_name(kwargs, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        tool_envs(**kwargs)


# --- the budget


def test_an_output_counts_towards_the_budget_and_is_cut_there():
    budget = len(ids(CALL)) + 5
    envs = tool_envs(budget=budget, k=budget)
    envs.reset(seed=0)
    _, _, terminated, truncated, _ = write(envs, CALL)
    assert not terminated.any() and not truncated.any()
    token_ids, is_action = envs.unwrapped.response(0)
    assert len(token_ids) == budget and is_action.sum() == budget - 5
    assert token_ids[-5:].tolist() == ids(OUTPUT)[:5]
    _, _, terminated, truncated, info = write(envs, "x")
    assert truncated.all() and not terminated.any()
    assert info["response_length"][0] == budget and info["response_mask"][0].sum() == budget - 5
    assert info["tool_calls"].tolist() == [1]


def test_a_call_that_ends_with_the_budget_is_not_made():
    budget = len(ids(CALL))
    envs = tool_envs(budget=budget, k=budget)
    envs.reset(seed=0)
    _, _, _, truncated, info = write(envs, CALL)
    assert truncated.all() and info["response"][0] == CALL and info["tool_calls"][0] == 0
    write(envs, "x")  # the slot is inert now
    assert response(envs) == CALL


# --- grains and autoreset

pieces = st.sampled_from(["x", "<python>", "</python>", "<python>print(1)</python>", ">"])
texts = st.lists(pieces, min_size=1, max_size=8).map("".join)


@given(texts, st.integers(2, 9))
@settings(max_examples=15)
def test_the_grain_of_the_steps_changes_nothing(text, k):
    ends = []
    for grain in (1, k):
        envs = tool_envs(k=grain)
        envs.reset(seed=0)
        left, ended = [*ids(text), EOS], False
        while not ended:  # a step of k tokens ends with a tag: the text goes on in the next one
            actions = np.array([[*left, *[NO_TOKEN] * grain][:grain]])
            before = envs.unwrapped.response(0)[1].sum()
            observations, _, terminated, truncated, info = envs.step(
                actions if grain > 1 else actions[:, 0]
            )
            left = left[envs.unwrapped.response(0)[1].sum() - before :]
            ended = terminated.any() or truncated.any()
        ends.append((observations, terminated, truncated, info))
    assert data_equivalence(*ends)


def test_a_reset_by_itself_forgets_the_calls_of_the_last_episode():
    envs = tool_envs(base={"autoreset_mode": "NextStep"}, budget=80, k=80)
    envs.reset(seed=0)
    write(envs, CALL)
    row = np.array([[EOS] + [NO_TOKEN] * 79])
    assert envs.step(row)[4]["tool_calls"].tolist() == [1]
    envs.step(row)  # resets
    assert response(envs) == ""
    assert envs.step(row)[4]["tool_calls"].tolist() == [0]


# --- training


class ScriptedEngine:
    """Writes texts turn by turn, and stops as an engine does: with the first stop string."""

    def __init__(self, *turns):
        self.turns = iter(turns)
        self.stops = []

    def generate(self, prompt_ids, sampling, n, seeds):
        self.stops.append(sampling.stop)
        texts = next(self.turns)
        completions = []
        for text in texts:
            tokens = np.asarray([*ids(text), EOS] if text.endswith(".") else ids(text), np.int32)
            logprobs = -0.5 * np.ones(len(tokens), np.float32)
            completions.append(Completion(tokens, logprobs, "stop", 0))
        return completions


@pytest.fixture(scope="module")
def played():
    """Return an engine, and a rollout of two responses, of which the first calls the tool."""
    envs = VerifierReward(tool_envs(2, base={"group_size": 2}), "scripted_scores:has_x")
    engine = ScriptedEngine([CALL, "so y."], ["so x."])
    return engine, rollout(envs, engine, question_ids=[0], seeds=np.arange(2))


def test_a_rollout_goes_round_once_more_for_each_call(played):
    engine, batch = played
    assert engine.stops == [("</python>",)] * 2
    assert batch.responses == [CALL + OUTPUT + "so x.", "so y."]
    assert batch.rewards.tolist() == [1, 0]
    asked, told, rest = len(ids(CALL)), len(ids(OUTPUT)), len(ids("so x.")) + 1
    expected = [True] * asked + [False] * told + [True] * rest
    assert batch.mask[0].tolist() == expected + [False] * (K - len(expected))
    assert (batch.sampling_logprobs[0][batch.mask[0]] == -0.5).all()
    assert not batch.sampling_logprobs[0][~batch.mask[0]].any()
    assert batch.response_lengths.tolist() == [len(expected), len(ids("so y.")) + 1]
    assert batch.token_rewards[0].argmax() == len(expected) - 1


def test_a_rollout_does_not_ask_the_engine_for_a_response_that_an_output_filled():
    budget = len(ids(CALL)) + 5
    envs = tool_envs(2, budget=budget, k=budget)
    engine = ScriptedEngine([CALL, "x"], ["x."])
    batch = rollout(envs, engine, question_ids=[0, 1], seeds=np.arange(2))
    assert len(engine.stops) == 2 and batch.truncated.tolist() == [True, False]
    assert batch.response_lengths.tolist() == [budget, 4]
    assert batch.mask.sum(axis=1).tolist() == [budget - 5, 4]


@pytest.fixture(scope="module")
def scored(played):
    """Return the rollout's one micro-batch, what the tiny model says of it, and where is output."""
    policy = Policy(load_model("tiny", device="cpu"), TOKENIZER.vocab_size)
    (micro,) = micro_batches(played[1], [np.arange(2)], 2, "cpu")
    logprobs = policy(micro.tokens, temperature=1.0)[0]
    written = torch.arange(micro.width) < micro.tokens.response_lengths[:, None]
    inserted = written & ~micro.mask
    assert inserted.sum() == len(ids(OUTPUT))
    return micro, policy, logprobs, inserted


def loss_of(name, batch, micro, logprobs, old_logprobs):
    algorithm, mask = ALGORITHMS[name], micro.mask
    if name == "ppo":
        rewards = torch.from_numpy(batch.token_rewards)[:, : micro.width].float()
        advantages, _ = algorithm.compute_advantages(rewards, torch.zeros_like(rewards), mask)
    else:
        advantages = algorithm.compute_advantages(torch.from_numpy(batch.rewards).float(), 2)
    totals = BatchTotals(2, int(mask.sum()), K)
    return algorithm.policy_loss(logprobs, old_logprobs, advantages, mask, totals)


@each(*NAMES)
def test_no_algorithm_depends_on_what_the_policy_says_of_inserted_tokens(name, played, scored):
    """Loss, metrics and gradient stay bit for bit what they were."""
    micro, _, logprobs, inserted = scored
    old = logprobs.detach() + 0.01 * micro.mask
    results = []
    for shift in (0.0, torch.linspace(-3, 3, micro.width) * inserted):
        leaf = (logprobs.detach() + shift).requires_grad_()
        loss, metrics = loss_of(name, played[1], micro, leaf, old)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert not gradient[inserted].any() and gradient[micro.mask].any()
        results.append([loss.detach(), gradient, *metrics.values()])
    assert all(map(torch.equal, *results))


def test_inserted_tokens_carry_no_gradient_through_the_model(played, scored):
    """The model's gradient is that of a loss which never sees their log-probs."""
    micro, policy, logprobs, inserted = scored
    parameters = list(policy.parameters())
    gradients = []
    for seen in (logprobs, torch.where(inserted, logprobs.detach(), logprobs)):
        loss, _ = loss_of("dr_grpo", played[1], micro, seen, logprobs.detach())
        gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True))
    assert all(map(torch.equal, *gradients)) and any(g.any() for g in gradients[0])


def test_the_example_shows_a_call_and_its_output(capsys):
    path = Path(__file__).parents[2] / "examples" / "python_tool.py"
    spec = importlib.util.spec_from_file_location("python_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    shown = capsys.readouterr().out
    assert "<output>\n15\n</output>\nSo it is. </think> <answer>15</answer>" in shown
    assert "reward 1.0" in shown
