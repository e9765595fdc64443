from __future__ import annotations

import math
from itertools import count

import numpy as np
import pytest
import torch
from random_models import EOS, VOCAB_SIZE, letter_tokenizer, random_model

import lmrl_env.engines.prefill
from lmrl_env.attention import use_packed_attention
from lmrl_env.engines.local import LocalEngine
from lmrl_env.errors import (
    ConfigurationError,
    EngineError,
    PromptTooLongError,
    WeightSyncError,
)
from lmrl_env.policy import Policy, TokenBatch
from lmrl_env.types import Completion, Sampling

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [0, 0, 1]]
NEVER = letter_tokenizer(eos=(VOCAB_SIZE,), context=4096)  # no token that can be drawn ends


def engine_of(architecture="qwen2", tokenizer=NEVER, *, seed=0, **kwargs) -> LocalEngine:
    model = random_model(architecture, torch.float32, seed)
    use_packed_attention(model)
    return LocalEngine(model, tokenizer, **kwargs)


def generate(engine, sampling, n=4, prompts=PROMPTS, first_seed=0) -> list[Completion]:
    return engine.generate(prompts, sampling, n, range(first_seed, first_seed + len(prompts) * n))


def token_lists(completions) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def next_token_probs(engine, ids, temperature=1.0) -> np.ndarray:
    """Return the distribution after some ids, forwarded by themselves, by Transformers' own."""
    engine._model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = engine._model(input_ids=torch.tensor([ids])).logits[0, -1, :VOCAB_SIZE].double()
    return (logits / temperature).softmax(-1).numpy()


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "mistral"])
def test_logprobs_are_those_of_the_policy(architecture):
    engine, sampling = engine_of(architecture), Sampling(20, temperature=0.7)
    completions = generate(engine, sampling)
    batch = TokenBatch(
        torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [0, 0, 1, 0, 0]]),
        torch.tensor([5, 2, 3]),
        torch.arange(3).repeat_interleave(4),
        torch.tensor(token_lists(completions)),
        torch.full((12,), 20),
    )
    with torch.no_grad():
        expected, _ = Policy(engine._model, VOCAB_SIZE)(batch, temperature=0.7)
    logprobs = np.stack([completion.logprobs for completion in completions])
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)
    assert logprobs.std() > 0.5


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(3, 1.0), (-1, 0.6), (5, 0.8)], ids=["top-k", "top-p", "both"]
)
def test_logprobs_are_renormalised_over_the_tokens_that_are_left(top_k, top_p):
    engine = engine_of()
    completions = generate(engine, Sampling(6, 0.7, top_p, top_k), n=2)
    for i, completion in enumerate(completions):
        ids = list(PROMPTS[i // 2])
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            probs = next_token_probs(engine, ids, 0.7)
            ranked = sorted(range(VOCAB_SIZE), key=lambda v: -probs[v])
            ranked = ranked[:top_k] if top_k > 0 else ranked
            mass, kept = sum(probs[ranked]), []
            while sum(probs[kept]) / mass < top_p - 1e-9 and len(kept) < len(ranked):
                kept.append(ranked[len(kept)])
            assert token in kept
            assert logprob == pytest.approx(np.log(probs[token] / sum(probs[kept])), abs=1e-4)
            ids.append(int(token))


def test_temperature_zero_is_greedy_with_logprobs_of_the_untempered_softmax():
    engine = engine_of()
    for i, completion in enumerate(generate(engine, Sampling(6, temperature=0), n=2)):
        ids = list(PROMPTS[i // 2])
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            probs = next_token_probs(engine, ids)
            assert token == probs.argmax()
            assert logprob == pytest.approx(np.log(probs[token]), abs=1e-4)
            ids.append(int(token))


def test_frequencies_of_tokens_are_the_softmax():
    engine, draws = engine_of(), 4000
    completions = generate(engine, Sampling(1, temperature=1.5), n=draws, prompts=PROMPTS[:1])
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=VOCAB_SIZE)
    expected = draws * next_token_probs(engine, PROMPTS[0], 1.5)
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 32.9  # the 99.9th percentile of chi-square with 12 degrees of freedom


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "mistral"])
def test_a_response_depends_on_its_own_seed_and_prompt_alone(architecture):
    engine, sampling = engine_of(architecture, letter_tokenizer()), Sampling(20)
    together = token_lists(generate(engine, sampling))
    assert len({len(tokens) for tokens in together}) > 3
    for i, tokens in enumerate(together):
        alone = engine.generate([PROMPTS[i // 4]], sampling, 1, [i])
        assert token_lists(alone) == [tokens]
    longer = token_lists(generate(engine, Sampling(40)))
    assert [tokens[:20] for tokens in longer] == together


def test_batches_of_few_rows_give_the_same_responses(monkeypatch):
    sampling = Sampling(20)
    expected = token_lists(generate(engine_of(tokenizer=letter_tokenizer()), sampling))
    few = engine_of(tokenizer=letter_tokenizer(), batch_size=5)
    assert token_lists(generate(few, sampling)) == expected
    monkeypatch.setattr(lmrl_env.engines.prefill, "TOKENS_AT_ONCE", 1)
    assert token_lists(generate(few, sampling)) == expected
    # Two layers, keys and values of 2 heads × 8 float32, 25 places: 6400 bytes a row.
    monkeypatch.setattr(lmrl_env.engines.local, "CACHE_BYTES", 3 * 6400)
    shapes = fed_shapes(few)
    assert token_lists(generate(few, sampling)) == expected
    assert max(rows for rows, _ in shapes) == 3


def fed_shapes(engine) -> list[tuple[int, ...]]:
    """Return a list to which every forward of the model appends the shape of its tokens."""
    shapes: list[tuple[int, ...]] = []
    engine._model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: shapes.append(tuple(args[0].shape))
    )
    return shapes


def test_different_prompts_are_forwarded_once_and_finished_rows_leave():
    engine = engine_of(tokenizer=letter_tokenizer())
    shapes = fed_shapes(engine)
    completions = generate(engine, Sampling(30), prompts=[*PROMPTS, PROMPTS[0]])
    lengths = np.array([len(completion.token_ids) for completion in completions])
    # Token t + 1 is drawn from a forward of the rows that have more than t tokens, and of some that
    # wait until eight can leave together.
    fed = [8 * math.ceil((lengths > t).sum() / 8) for t in range(1, lengths.max())]
    assert len(lengths) == 16
    assert shapes == [(1, sum(map(len, PROMPTS))), *((rows, 1) for rows in fed)]
    assert set(fed) == {16, 8}


def test_a_response_ends_with_eos_or_the_budget():
    completions = generate(engine_of(tokenizer=letter_tokenizer()), Sampling(8), n=20)
    reasons = set()
    for completion in completions:
        tokens = completion.token_ids
        assert tokens.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert len(tokens) == len(completion.logprobs) <= 8
        assert EOS not in tokens[:-1]
        if tokens[-1] == EOS:
            assert completion.finish_reason == "stop"
        else:
            assert completion.finish_reason == "length"
            assert len(tokens) == 8
        reasons.add((completion.finish_reason, len(tokens) == 8))
    assert reasons == {("stop", False), ("stop", True), ("length", True)}


def test_a_stop_string_that_tokens_straddle_ends_a_response_with_its_last_token():
    engine = engine_of()
    free = [NEVER.decode(tokens) for tokens in token_lists(generate(engine, Sampling(30), n=20))]
    stop = free[0][4:6]
    assert stop.isalpha()
    stopped = generate(engine, Sampling(30, stop=(stop, "no such text")), n=20)
    reasons = set()
    for text, completion in zip(free, stopped, strict=True):
        end = text.find(stop) + len(stop) if stop in text else None
        assert NEVER.decode(completion.token_ids) == text[:end]
        assert completion.finish_reason == ("stop" if stop in text else "length")
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}
    # On the last token of the budget a stop string still is a stop.
    end = free[0].find(stop) + len(stop)
    (last,) = engine.generate(PROMPTS[:1], Sampling(end, stop=(stop,)), 1, [0])
    assert (len(last.token_ids), last.finish_reason) == (end, "stop")


def test_rows_of_one_length_need_no_mask():
    engine, masks = engine_of(), []
    engine._model.set_attn_implementation("sdpa")
    engine._model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    prompts = [[1, 2, 3], [4, 5, 6]]
    equal = token_lists(generate(engine, Sampling(5), prompts=prompts))
    assert masks == [None] * 5
    padded = token_lists(generate(engine, Sampling(5), prompts=[*prompts, [1] * 9]))
    assert padded[: len(equal)] == equal


def test_a_prompt_that_leaves_no_room_for_the_budget_is_refused():
    engine = engine_of(tokenizer=letter_tokenizer(context=10))
    generate(engine, Sampling(5))
    with pytest.raises(PromptTooLongError, match=r"5 tokens and max_new_tokens=6 .* 10 tokens"):
        generate(engine, Sampling(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPTS, Sampling(0), 1, [1, 2, 3]), "max_new_tokens is 0"),
        ((PROMPTS, Sampling(1, -0.5), 1, [1, 2, 3]), "temperature is -0.5"),
        ((PROMPTS, Sampling(1, top_p=0.0), 1, [1, 2, 3]), "top_p is 0.0"),
        ((PROMPTS, Sampling(1, top_k=0), 1, [1, 2, 3]), "top_k is 0"),
        ((PROMPTS, Sampling(1), 0, []), "n is 0"),
        ((PROMPTS, Sampling(1), 2, [1, 2, 3]), "seeds is 3: expected 6"),
        ((PROMPTS, Sampling(1), 1, [1, 2, -3]), "lowest seed is -3"),
        (([[1], []], Sampling(1), 1, [1, 2]), "shortest prompt is 0"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        engine_of().generate(*arguments)


def test_no_prompts_give_no_responses():
    assert engine_of().generate([], Sampling(4), 2, []) == []


def test_logits_that_are_not_finite_are_an_error():
    engine = engine_of()
    with torch.no_grad():
        engine._model.get_input_embeddings().weight[6] = torch.nan
    with pytest.raises(EngineError, match="not finite"):
        generate(engine, Sampling(4))


def test_sampling_leaves_the_module_as_it_was():
    engine = engine_of()
    module = engine._model
    module.train()
    module.base_model.layers[0].eval()
    module.gradient_checkpointing_enable()
    modes = [m.training for m in module.modules()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    generate(engine, Sampling(4))
    assert [m.training for m in module.modules()] == modes
    assert all(parameter.requires_grad for parameter in module.parameters())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    module(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()


def test_an_update_with_the_module_s_own_weights_copies_nothing():
    engine = engine_of()
    versions = [tensor._version for tensor in engine._model.state_dict().values()]
    with torch.no_grad():
        engine._model.get_input_embeddings().weight.mul_(2)  # as an optimiser does, in place
    doubled = [tensor._version for tensor in engine._model.state_dict().values()]
    assert generate(engine, Sampling(2))[0].version == 0
    engine.update_weights(engine._model.state_dict().items(), version=3)
    assert [tensor._version for tensor in engine._model.state_dict().values()] == doubled
    assert doubled != versions
    assert generate(engine, Sampling(2))[0].version == 3


def test_an_update_with_other_weights_makes_the_engine_sample_from_them():
    engine, other = engine_of(), engine_of(seed=1)
    sampling = Sampling(10)
    expected = generate(other, sampling)
    assert token_lists(generate(engine, sampling)) != token_lists(expected)
    # lm_head and embeddings are tied: one of the two names is enough.
    weights = other._model.state_dict()
    del weights["lm_head.weight"]
    engine.update_weights(weights.items(), version=1)
    assert token_lists(generate(engine, sampling)) == token_lists(expected)
    assert engine._model is not other._model
    with torch.no_grad():
        other._model.get_input_embeddings().weight.zero_()
    assert token_lists(generate(engine, sampling)) == token_lists(expected)


def test_an_update_with_a_wrong_name_shape_or_number_of_weights_is_refused():
    engine = engine_of("llama")
    weights = engine._model.state_dict()
    with pytest.raises(WeightSyncError, match=r"'module\.lm_head\.weight' is not in"):
        engine.update_weights([("module.lm_head.weight", weights["lm_head.weight"])], 1)
    with pytest.raises(WeightSyncError, match=r"\(3, 32\): expected \(16, 32\)"):
        engine.update_weights([("lm_head.weight", torch.zeros(3, 32))], 1)
    del weights["model.norm.weight"]
    with pytest.raises(WeightSyncError, match=r"without \['model\.norm\.weight'\] \(1 weights\)"):
        engine.update_weights(weights.items(), 1)
    assert engine.version == 0


def test_the_tiny_model_writes_text_that_stops_at_the_stop_string(tokenizer):
    from lmrl_env.policy import load_model

    engine = LocalEngine(load_model("tiny"), tokenizer)
    prompt = engine.encode("User: What is 1 + 1?\nAssistant: <think>")
    free = engine.generate([prompt], Sampling(40), 4, [1, 2, 3, 4])
    texts = [engine.decode(completion.token_ids) for completion in free]
    middle = next(i for i in count(10) if texts[0][i : i + 4].isascii())
    stop = texts[0][middle : middle + 4]
    stopped = engine.generate([prompt], Sampling(40, stop=(stop,)), 4, [1, 2, 3, 4])
    text = engine.decode(stopped[0].token_ids)
    assert stopped[0].finish_reason == "stop"
    assert stop in text
    assert stop not in engine.decode(stopped[0].token_ids[:-1])
    assert texts[0].startswith(text)
