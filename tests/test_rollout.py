from __future__ import annotations

import re
import threading

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import VectorWrapper
from small_envs import token_envs
from test_batches import make_rollout

from lmrl_env.errors import ConfigurationError
from lmrl_env.rollout import Rollout, response_seeds, rollout
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.types import Completion
from lmrl_env.wrappers import WeightedRewards

TOKENIZER = load_tokenizer("tiny")
EOS = TOKENIZER.eos_token_ids[0]
BUDGET = 12
PLAIN = TOKENIZER.encode("x")[0]


class ScriptedEngine:
    """Writes a fixed response per seed; its log-probs are minus the token's place in the state."""

    version = 4

    def __init__(self, script):
        self.script = script
        self.prompts: list[list[list[int]]] = []
        self.calls: list[tuple[int, int]] = []
        self.budgets: list[int] = []
        self.seeds: list[list[int]] = []

    def generate(self, prompt_ids, sampling, n, seeds):
        self.calls.append((len(prompt_ids), n))
        self.budgets.append(sampling.max_new_tokens)
        self.seeds.append(list(seeds))
        self.prompts.append([list(prompt) for prompt in prompt_ids])
        completions = []
        for i, seed in enumerate(seeds):
            tokens = np.asarray(self.script(seed, len(self.calls)), dtype=np.int32)
            places = len(prompt_ids[i // n]) + np.arange(len(tokens))
            completions.append(Completion(tokens, -places.astype(np.float32), "stop", 4))
        return completions


def play(envs, script, seeds=None, question_ids=None):
    env = envs.unwrapped
    engine = ScriptedEngine(script)
    groups = env.num_envs // env.group_size
    batch = rollout(
        envs,
        engine,
        question_ids=list(range(groups)) if question_ids is None else question_ids,
        seeds=np.arange(env.num_envs) if seeds is None else seeds,
    )
    return engine, batch


def test_a_rollout_holds_what_was_written_and_asks_a_prompt_once_a_group():
    envs = token_envs(4, group_size=2, tokens_per_step=BUDGET)
    engine, batch = play(envs, lambda seed, turn: [PLAIN] * seed + [EOS])
    assert engine.calls == [(2, 2)]
    assert batch.response_lengths.tolist() == [1, 2, 3, 4]
    assert (batch.response_ids[2, :4] == [PLAIN, PLAIN, EOS, 0]).all()
    assert batch.mask.sum(axis=1).tolist() == [1, 2, 3, 4]
    assert batch.terminated.all() and not batch.truncated.any()
    assert batch.question_ids.tolist() == [0, 0, 1, 1]
    assert batch.versions.tolist() == [4] * 4
    assert batch.responses == ["", "x", "xx", "xxx"]
    start = batch.prompt_lengths[3]
    expected = [-start, -start - 1, -start - 2, -start - 3, 0]
    assert batch.sampling_logprobs[3, :5].tolist() == expected
    prompt = batch.prompt_ids[0, : batch.prompt_lengths[0]].tolist()
    assert prompt == engine.prompts[0][0] == envs.prompts[0].tolist()


def test_what_the_engine_writes_beyond_the_end_is_no_action():
    _, batch = play(token_envs(1, tokens_per_step=BUDGET), lambda seed, turn: [EOS, PLAIN])
    assert batch.response_lengths.tolist() == [1]
    assert batch.mask.sum() == 1 and not batch.sampling_logprobs[0, 1:].any()


def test_a_response_without_an_end_is_truncated_by_the_budget():
    _, batch = play(token_envs(1, tokens_per_step=BUDGET), lambda seed, turn: [PLAIN] * BUDGET)
    assert batch.truncated.all() and batch.response_lengths.tolist() == [BUDGET]


class Inserting(VectorWrapper):
    """Inserts two tokens behind the first step of slot 0, as a tool would."""

    inserted = False

    def step(self, actions):
        result = self.env.step(actions)
        if not self.inserted:
            self.inserted = True
            self.unwrapped.insert_tokens(0, [5, 6])
            return (self.unwrapped._observe(), *result[1:])
        return result


def test_a_slot_with_inserted_tokens_is_written_on_from_its_state_and_they_are_masked_out():
    envs = Inserting(token_envs(2, tokens_per_step=BUDGET, group_size=2))

    def script(seed, turn):
        return [PLAIN, EOS] if seed == 1 else [PLAIN] if turn == 1 else [PLAIN, EOS]

    engine, batch = play(envs, script)
    assert engine.calls == [(1, 2), (1, 1)]
    assert engine.budgets == [BUDGET, BUDGET - 3]  # one token written, two inserted
    assert engine.seeds == [[0, 1], [1]]  # a turn has a seed of its own
    assert engine.prompts[1][0][-3:] == [PLAIN, 5, 6]
    assert batch.response_ids[0, :5].tolist() == [PLAIN, 5, 6, PLAIN, EOS]
    assert batch.mask[0, :6].tolist() == [True, False, False, True, True, False]
    start = batch.prompt_lengths[0]
    assert batch.sampling_logprobs[0, :5].tolist() == [-start, 0, 0, -start - 3, -start - 4]
    assert batch.response_lengths.tolist() == [5, 2]


class Paying(VectorWrapper):
    """Pays for every step and again at the end."""

    def step(self, actions):
        observations, rewards, terminated, truncated, info = self.env.step(actions)
        return observations, rewards + 1 + 2 * terminated, terminated, truncated, info


def test_rewards_come_through_the_wrappers_of_the_environment():
    _, batch = play(Paying(token_envs(2, tokens_per_step=BUDGET)), lambda seed, turn: [EOS])
    assert batch.rewards.tolist() == [3.0, 3.0]


class Dense(VectorWrapper):
    """Pays 1 for each token x, and says at the end where."""

    def step(self, actions):
        env = self.unwrapped
        before = env.response_lengths.copy()
        observations, rewards, terminated, truncated, info = self.env.step(actions)
        paid = np.zeros((env.num_envs, BUDGET))
        for slot in range(env.num_envs):
            ids, is_action = env.response(slot)
            paid[slot, : len(ids)] = (ids == PLAIN) & is_action
            rewards[slot] += paid[slot, before[slot] :].sum()
        ended = terminated | truncated
        if ended.any():
            info["token_rewards"], info["_token_rewards"] = paid, ended
        return observations, rewards, terminated, truncated, info


def test_dense_rewards_stand_at_their_tokens_and_the_rest_of_the_return_at_the_last_action():
    envs = Inserting(Paying(Dense(token_envs(2, tokens_per_step=BUDGET, group_size=2))))

    def script(seed, turn):
        return [PLAIN, EOS] if seed == 1 else [PLAIN] if turn == 1 else [PLAIN, EOS]

    _, batch = play(envs, script)
    # Paying adds 1 a step and 2 at the end: slot 0 takes two steps, and slot 1 is done after one.
    assert batch.rewards.tolist() == [1 + 1 + 2 + 2, 1 + 1 + 2]
    assert batch.dense_rewards[0, :6].tolist() == [1, 0, 0, 1, 0, 0]
    assert batch.token_rewards[0, :6].tolist() == [1, 0, 0, 1, 4, 0]
    assert batch.token_rewards[1, :6].tolist() == [1, 3, 0, 0, 0, 0]
    joined = Rollout.concatenate([batch, batch.take([1])])
    assert joined.token_rewards.sum(axis=1).tolist() == [6, 4, 4]


def test_an_engine_stops_where_a_wrapper_wants_to_be_asked():
    envs = token_envs(1, tokens_per_step=BUDGET)
    envs.pause_at(["</tool>"])
    envs.pause_at(["?"])
    seen = []

    class Listening(ScriptedEngine):
        def generate(self, prompt_ids, sampling, n, seeds):
            seen.append(sampling.stop)
            return super().generate(prompt_ids, sampling, n, seeds)

    rollout(envs, Listening(lambda *_: [EOS]), question_ids=[0], seeds=np.arange(1))
    assert seen == [("</answer>", "</tool>", "?")]


def in_parts(envs, engine, parts):
    env = envs.unwrapped
    groups = np.arange(env.num_envs // env.group_size)
    return rollout(envs, engine, question_ids=groups, seeds=np.arange(env.num_envs), parts=parts)


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_a_rollout_in_parts_is_the_rollout_in_one(parts):
    def script(seed, turn):
        return [PLAIN] * (seed % 5) + [EOS]

    batches = []
    for count in (1, parts):
        envs = Paying(Dense(token_envs(8, tokens_per_step=BUDGET, group_size=2)))
        engine = ScriptedEngine(script)
        batches.append(in_parts(envs, engine, count)._replace(sample_seconds=0, env_seconds=0))
        assert len(engine.calls) == min(count, 4) and all(n == 2 for _, n in engine.calls)
    assert data_equivalence(*(batch._asdict() for batch in batches))


def test_parts_whose_responses_are_interrupted_go_on_together():
    envs = Inserting(token_envs(4, tokens_per_step=BUDGET, group_size=2))
    engine = ScriptedEngine(lambda seed, turn: [PLAIN] if (seed, turn) == (0, 1) else [EOS])
    batch = in_parts(envs, engine, 2)
    assert engine.calls == [(1, 2), (1, 2), (1, 1)]
    assert batch.response_ids[0, :4].tolist() == [PLAIN, 5, 6, EOS]
    assert batch.response_lengths.tolist() == [4, 1, 1, 1] and batch.terminated.all()


def test_one_part_is_graded_while_the_engine_writes_the_next():
    writes_the_second, first_is_graded = threading.Event(), threading.Event()

    class Grading(VectorWrapper):
        def step(self, actions):
            assert writes_the_second.wait(20)  # each waits for the other: in turn neither would end
            result = self.env.step(actions)
            first_is_graded.set()
            return result

    class Writing(ScriptedEngine):
        def generate(self, *args):
            if self.calls:
                writes_the_second.set()
                assert first_is_graded.wait(20)
            return super().generate(*args)

    envs = Grading(token_envs(2, tokens_per_step=BUDGET))
    assert in_parts(envs, Writing(lambda *_: [EOS]), 2).terminated.all()


def test_an_error_in_a_part_ends_the_rollout():
    class Failing(VectorWrapper):
        def step(self, actions):
            raise KeyError("step")

    with pytest.raises(KeyError, match="step"):
        in_parts(
            Failing(token_envs(4, tokens_per_step=BUDGET)), ScriptedEngine(lambda *_: [EOS]), 2
        )


def test_no_parts_are_refused():
    with pytest.raises(ConfigurationError, match="parts=0: expected at least 1"):
        in_parts(token_envs(1, tokens_per_step=BUDGET), None, 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens_per_step": 1}, "tokens_per_step=1: a rollout steps by whole responses"),
        ({"tokens_per_step": BUDGET, "autoreset_mode": "NextStep"}, "one episode a slot"),
    ],
)
def test_an_environment_that_cannot_be_rolled_out_is_refused(kwargs, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        play(token_envs(1, **kwargs), lambda seed, turn: [EOS])


def test_token_rewards_stand_at_the_last_action_of_each_response():
    batch = make_rollout([3], [1, 4, 6, 6], group_size=4)
    mask = np.array(
        [  # the third ends with tokens that were inserted
            [1, 0, 0, 0, 0, 0],
            [1, 0, 0, 1, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 1, 1, 1, 1],
        ],
        dtype=bool,
    )
    batch = batch._replace(mask=mask, rewards=np.array([1.0, 0.5, -2.0, 0.25]))
    expected = np.zeros((4, 6))
    expected[[0, 1, 2, 3], [0, 3, 3, 5]] = [1.0, 0.5, -2.0, 0.25]
    assert (batch.token_rewards == expected).all()
    assert batch.token_rewards.dtype == np.float64


def test_rows_are_taken_in_the_order_given_and_the_batch_is_left_alone():
    envs = token_envs(4, tokens_per_step=BUDGET)
    _, batch = play(envs, lambda seed, turn: [PLAIN] * seed + [EOS])
    taken = batch.take([2, 0, 2])
    for name, values in batch._asdict().items():
        if isinstance(values, float):  # seconds
            assert getattr(taken, name) == values
        else:
            rows = [values[2], values[0], values[2]]
            assert data_equivalence(list(getattr(taken, name)), rows), name
    taken.rewards[:] = taken.mask[:] = 7
    assert batch.rewards.tolist() == [0] * 4 and batch.mask.sum() == 1 + 2 + 3 + 4
    assert len(batch.take([]).rewards) == 0


def test_batches_of_prompts_of_any_width_are_joined_row_by_row():
    envs = token_envs(2, tokens_per_step=BUDGET)
    lengths = np.array([len(prompt) for prompt in envs.prompts])
    short, long = int(lengths.argmin()), int(lengths.argmax())
    _, one = play(envs, lambda seed, turn: [PLAIN, EOS], question_ids=[short, short])
    _, other = play(envs, lambda seed, turn: [EOS], question_ids=[long, short])
    assert one.prompt_ids.shape[1] == lengths.min() < other.prompt_ids.shape[1] == lengths.max()
    for batches in ([one, other], [other, one]):
        joined = Rollout.concatenate(batches)
        assert joined.prompt_ids.shape == (4, lengths.max())
        for i, (batch, row) in enumerate((batch, row) for batch in batches for row in (0, 1)):
            width = batch.prompt_lengths[row]
            prompt = batch.prompt_ids[row, :width].tolist()
            assert joined.prompt_ids[i, :width].tolist() == prompt
            assert not joined.prompt_ids[i, width:].any()
            for name in set(Rollout._fields) - {"prompt_ids", "sample_seconds", "env_seconds"}:
                assert data_equivalence(getattr(joined, name)[i], getattr(batch, name)[row]), name
        assert joined.sample_seconds == sum(batch.sample_seconds for batch in batches)
        assert joined.env_seconds == sum(batch.env_seconds for batch in batches)
    joined.rewards[:] = 5
    assert one.rewards.tolist() == [0, 0]


@pytest.mark.parametrize("parts", [1, 2])
def test_scores_of_several_verifiers_come_along_by_name(parts, tmp_path):
    verifiers = {"x": ("scripted_scores:has_x", 1.0), "y": ("scripted_scores:has_y", 0.5)}
    envs = WeightedRewards(token_envs(3, tokens_per_step=BUDGET), verifiers)
    texts = [TOKENIZER.encode("x") + [EOS], TOKENIZER.encode("xy") + [EOS], [PLAIN] * BUDGET]
    engine = ScriptedEngine(lambda seed, turn: texts[seed])
    batch = rollout(envs, engine, question_ids=range(3), seeds=np.arange(3), parts=parts)
    assert batch.scores == [{"x": 1.0, "y": 0.0}, {"x": 1.0, "y": 2.0}, {"x": None, "y": None}]
    batch.save(tmp_path / "batch")
    assert Rollout.load(tmp_path / "batch")[0].scores == batch.scores
    assert Rollout.concatenate([batch.take([1]), batch.take([0])]).scores == batch.scores[1::-1]


def test_parts_of_a_batch_joined_again_are_the_batch():
    envs = token_envs(4, tokens_per_step=BUDGET)
    _, batch = play(envs, lambda seed, turn: [PLAIN] * seed + [EOS])
    again = Rollout.concatenate([batch.take([0]), batch.take([1, 2, 3])])
    for name in set(Rollout._fields) - {"sample_seconds", "env_seconds"}:
        assert data_equivalence(getattr(again, name), getattr(batch, name)), name


def test_seeds_of_a_step_do_not_depend_on_how_many_are_drawn():
    assert (response_seeds(3, 5, 100)[:7] == response_seeds(3, 5, 7)).all()
    assert len(set(response_seeds(3, 5, 100)) | set(response_seeds(3, 6, 100))) == 200


def test_a_saved_batch_is_read_back_whole(tmp_path):
    envs = gym.make_vec(
        "MathR1-v0",
        num_envs=2,
        questions="arithmetic:size=20",
        max_new_tokens=BUDGET,
        tokens_per_step=BUDGET,
        autoreset_mode="Disabled",
    )
    _, batch = play(envs, lambda seed, turn: [PLAIN] * seed + [EOS])
    batch.save(tmp_path / "new" / "batch.safetensors", group_size=2)
    again, metadata = Rollout.load(tmp_path / "new" / "batch.safetensors")
    assert metadata == {"group_size": 2}
    assert data_equivalence(again._asdict(), batch._asdict())
    assert again.verifier_status == ["unparseable"] * 2
