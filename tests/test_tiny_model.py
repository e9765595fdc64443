import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.questions.arithmetic import arithmetic_questions
from lmrl_env.templates import R1
from lmrl_env.tokenizer import TINY_MODEL, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_MODEL)


def test_the_folder_takes_at_most_5_megabytes():
    files = {path.name: path.stat().st_size for path in TINY_MODEL.iterdir()}
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(files)
    assert sum(files.values()) <= 5_000_000


def test_the_context_is_at_least_4096_tokens(model):
    assert model.config.max_position_embeddings >= 4096
    assert load_tokenizer("tiny").context_length >= 4096


def test_the_weights_are_float32_and_every_token_has_an_embedding(model, tokenizer):
    import torch

    assert model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_eos_is_one_token_and_pads(tokenizer, model):
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_chat_markup_is_one_token_each(tokenizer):
    assert len(tokenizer("<|im_start|><|im_end|>")["input_ids"]) == 2


@given(
    digits=st.text("0123456789", min_size=1, max_size=12), before=st.sampled_from(["", " ", "="])
)
@settings(max_examples=50, deadline=None)
def test_every_digit_is_a_single_token(tokenizer, digits, before):
    pieces = [tokenizer.decode([i]) for i in tokenizer(before + digits)["input_ids"]]
    assert pieces == [*before, *digits]


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    token_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(token_ids, clean_up_tokenization_spaces=False) == text


@given(index=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_a_prompt_has_the_same_tokens_alone_and_before_a_response(tokenizer, index):
    question = arithmetic_questions("heldout", size=100)[index].question
    prompt, response = R1.render(question), " So it is 12. </think> <answer>12</answer>"
    both = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"]
    assert tokenizer(prompt + response)["input_ids"] == both


def test_it_knows_how_a_document_ends(model, tokenizer):
    import torch

    question = arithmetic_questions("heldout", size=1)[0].question
    text = R1.render(question) + " Maybe it is 12. </think> <answer>"
    with torch.no_grad():
        output = model.generate(
            **tokenizer(text, return_tensors="pt"), max_new_tokens=12, do_sample=False
        )
    assert tokenizer.decode(output[0]).endswith("<answer>12</answer><|endoftext|>")
