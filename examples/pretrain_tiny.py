"""Pretrain the tiny base model from scratch, on text that this file makes.

The documents pose word problems of the training split and solve them in one of two styles. A
*careful* solution works step by step and is nearly always right; a *careless* one guesses, is
shorter, and mostly wrong. Either shows in the first words. After the result stands a tail of free
length ("Let me check again. It is 12.") that never revises it. So a reader of the first words
knows how likely the answer is to be right, reinforcement learning has a style to prefer, and
a loss that is biased towards short or long answers has a length to choose.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmrl_env.linear import use_onednn
from lmrl_env.questions.arithmetic import (
    LARGEST,
    SMALLEST,
    Problem,
    Step,
    arithmetic_questions,
    problems,
)
from lmrl_env.templates import NONE, QWEN_MATH, R1, TEMPLATES, Template
from lmrl_env.types import Question

EOS, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 512

CAREFUL_SHARE = {R1.name: 0.3, QWEN_MATH.name: 0.4, NONE.name: 0.6}
"""How often a solution is careful; most often without a template, as for Qwen2.5-Math."""
CAREFUL_ACCURACY = 0.97
CARELESS_ACCURACY = 0.2
TAIL_PROBABILITY = 0.5
"""Of one more sentence after the result, whatever was said before."""
EXERCISE = Template("exercise", "Exercise: {question}\nSolution:", (), "either")


class Diet(NamedTuple):
    """What a base model reads.

    Attributes:
        formats: shares of documents: the three templates, plain lists of ``sums``, and
            ``questions``, a few of them one after another.
        first: around the one-step questions of the first documents.
        level: of the problems, or None for all levels.
    """

    formats: Mapping[str, float]
    first: Template
    level: int | None


DIETS = {
    "mixed": Diet({"r1": 0.2, "qwen-math": 0.15, "none": 0.5, "sums": 0.15}, NONE, None),
    "qa": Diet({"none": 0.85, "sums": 0.15}, NONE, 1),
    "text": Diet({"r1": 0.35, "qwen-math": 0.25, "questions": 0.25, "sums": 0.15}, EXERCISE, 1),
}
"""``mixed`` is what the shipped model read. In ``qa`` a question is always bare and its solution
follows at once. In ``text`` a solution never follows a bare question: another question does. The
last two have one-step problems only, so that two thousand steps suffice."""

CHUNK_DOCUMENTS = 4096
FIRST_DOCUMENTS = 8 * CHUNK_DOCUMENTS
PROMPT_LOSS_SHARE = 0.1
BATCH_TOKENS = 2048
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100

EVAL_SAMPLES = 8
EVAL_BATCH = 32
MAX_NEW_TOKENS = 96

CAREFUL_OPENINGS = ("Step by step:", "Let me work it out:", "I calculate:")
CARELESS_OPENINGS = ("I guess it is", "At a glance it is", "Maybe it is")
CONCLUSIONS = ("So it is", "The result is")
TAILS = ("Let me check again. It is", "I recheck: it is", "Double-check: it is")


class Document(NamedTuple):
    """A training text.

    Attributes:
        prompt: what a template makes of a question; empty for plain text.
        completion: what follows, without the EOS.
    """

    prompt: str
    completion: str


def write_sums(steps: Sequence[Step]) -> str:
    """Return the steps as text, such as ``3+4=7, 7*2=14``."""
    return ", ".join(f"{s.left}{s.operator}{s.right}={s.result}" for s in steps)


def write_solution(rng: random.Random, problem: Problem, careful: bool) -> tuple[str, int]:
    """Return the reasoning about a problem and the result that it commits to."""
    right = rng.random() < (CAREFUL_ACCURACY if careful else CARELESS_ACCURACY)
    if right:
        result = problem.answer
    elif careful:  # a slip in the last step
        result = min(LARGEST, max(SMALLEST, problem.answer + rng.choice((-10, -2, -1, 1, 2, 10))))
    else:
        result = rng.randint(SMALLEST, LARGEST)
    if careful:
        sums = write_sums([*problem.steps[:-1], problem.steps[-1]._replace(result=result)])
        text = f"{rng.choice(CAREFUL_OPENINGS)} {sums}. {rng.choice(CONCLUSIONS)}"
    else:
        text = rng.choice(CARELESS_OPENINGS)
    text += f" {result}."
    while rng.random() < TAIL_PROBABILITY:
        text += f" {rng.choice(TAILS)} {result}."
    return text, result


def write_document(rng: random.Random, problem: Problem, template: Template) -> Document:
    """Return a document that poses a problem and solves it."""
    careful = rng.random() < CAREFUL_SHARE[template.name]
    text, result = write_solution(rng, problem, careful)
    if template is R1:
        completion = f" {text} </think> <answer>{result}</answer>"
    elif template is QWEN_MATH:
        completion = f"{text} \\boxed{{{result}}}"
    else:
        completion = f" {text} \\boxed{{{result}}}"
    return Document(template.render(problem.question), completion)


def documents(seed: int, diet: Diet) -> Iterator[Document]:
    """Yield documents without end, the first of them short: one sum to a one-step question.

    From these, attention learns to find the numbers in a question. Without them the loss stays
    for thousands of steps where sums are right but their numbers are not those of the question.
    """
    rng = random.Random(seed)
    chosen = problems("train", level=diet.level, seed=seed)
    one_step = problems("train", level=1, seed=seed)
    for problem in itertools.islice(one_step, FIRST_DOCUMENTS):
        prompt = diet.first.render(problem.question)
        yield Document(prompt, f" {write_sums(problem.steps)}.")
    while True:
        name = rng.choices(list(diet.formats), list(diet.formats.values()))[0]
        if name == "sums":
            steps = [problem.steps[0] for problem in itertools.islice(one_step, 10)]
            yield Document("", f"{write_sums(steps)}.")
        elif name == "questions":
            few = itertools.islice(chosen, rng.randint(2, 4))
            yield Document("", " ".join(problem.question for problem in few))
        else:
            yield write_document(rng, next(chosen), TEMPLATES[name])


def train_tokenizer(corpus: Sequence[Document]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose digits are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"'s| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.prompt + d.completion for d in corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[IM_START, IM_END],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, corpus: Sequence[Document], rng: random.Random
) -> list[tuple[list[int], int]]:
    """Return the token ids of documents, and how many of their first tokens carry no loss.

    Prompts are encoded alone, as when sampling. Most carry no loss: their random names and numbers
    teach little and drown the rest.
    """
    rows = []
    prompts = tokenizer([document.prompt for document in corpus])["input_ids"]
    completions = tokenizer([document.completion for document in corpus])["input_ids"]
    for prompt, completion in zip(prompts, completions, strict=True):
        masked = 0 if rng.random() < PROMPT_LOSS_SHARE else len(prompt)
        rows.append((prompt + completion + [tokenizer.eos_token_id], masked))
    return rows


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, diet: Diet
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield input ids and labels without end, documents of about the same length together.

    Yields:
        Two tensors of shape (documents, tokens), int64, right-padded; the label -100 marks
        padding and prompts that carry no loss.
    """
    rng = random.Random(seed)
    source = documents(seed, diet)
    while True:
        corpus = list(itertools.islice(source, CHUNK_DOCUMENTS))
        rows = sorted(encode_documents(tokenizer, corpus, rng), key=lambda row: len(row[0]))
        cuts = [0]
        for i, (ids, _) in enumerate(rows):
            if (i + 1 - cuts[-1]) * len(ids) > BATCH_TOKENS:
                cuts.append(i)
        groups = [rows[a:b] for a, b in itertools.pairwise([*cuts, len(rows)])]
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            input_ids = torch.zeros(len(group), width, dtype=torch.int64)
            labels = torch.full_like(input_ids, -100)
            for i, (ids, masked) in enumerate(group):
                input_ids[i, : len(ids)] = torch.tensor(ids)
                labels[i, masked : len(ids)] = torch.tensor(ids[masked:])
            yield input_ids, labels


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, diet: Diet
) -> float:
    """Train in place and return the mean loss of the last hundred steps, in nats per token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    loss_mean = math.log(VOCAB_SIZE)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("pretrain", total=steps)
        for (input_ids, labels), _ in zip(
            batches(tokenizer, seed, diet), range(steps), strict=False
        ):
            logits = model(input_ids=input_ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            loss_mean += 0.01 * (loss.item() - loss_mean)
            progress.update(task, advance=1, description=f"pretrain, loss {loss_mean:.3f}")
    return loss_mean


class Response(NamedTuple):
    """What is measured of one sampled response.

    Attributes:
        right: whether it finished with the right answer.
        finished: whether it ended within the budget.
        careful: whether it opened in the careful style.
        tokens: its length without the EOS.
        tails: sentences after the result.
    """

    right: bool
    finished: bool
    careful: bool
    tokens: int
    tails: int


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    questions: Sequence[Question],
) -> list[Response]:
    """Sample responses to questions at temperature 1, those to a question adjacent."""
    responses = []
    for start in range(0, len(questions), EVAL_BATCH):
        group = questions[start : start + EVAL_BATCH]
        prompts = [template.render(question.question) for question in group]
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(  # type: ignore[misc]
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=EVAL_SAMPLES,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for i, row in enumerate(output[:, inputs["input_ids"].shape[1] :].tolist()):
            finished = tokenizer.eos_token_id in row
            token_ids = row[: row.index(tokenizer.eos_token_id)] if finished else row
            answer = group[i // EVAL_SAMPLES].answer
            text = str(tokenizer.decode(token_ids)).strip()
            answers = re.findall(r"<answer>(\d+)</answer>|boxed{(\d+)}", text)
            right = finished and bool(answers) and answer in answers[-1]
            responses.append(
                Response(
                    right=right,
                    finished=finished,
                    careful=text.startswith(CAREFUL_OPENINGS),
                    tokens=len(token_ids),
                    tails=sum(text.count(tail) for tail in TAILS),
                )
            )
    return responses


def mean(values: Iterable[float]) -> str:
    """Return a mean as a table cell; a dash where there are none."""
    values = list(values)
    return f"{sum(values) / len(values):.3g}" if values else "-"


def template_row(name: str, responses: Sequence[Response]) -> str:
    """Return the line of a template in the model card's first table."""
    groups = [responses[i : i + EVAL_SAMPLES] for i in range(0, len(responses), EVAL_SAMPLES)]
    cells = [
        name,
        mean(r.right for r in responses),
        mean(any(r.right for r in group) for group in groups),
        mean(not r.finished for r in responses),
        mean(r.tokens for r in responses if r.right),
        mean(r.tokens for r in responses if not r.right),
        mean(r.careful for r in responses),
        mean(r.right for r in responses if r.careful),
        mean(r.right for r in responses if not r.careful),
    ]
    return f"| {' | '.join(cells)} |"


def style_row(careful: bool, right: bool, responses: Sequence[Response]) -> str:
    """Return the line of a style and an outcome in the model card's second table."""
    chosen = [r for r in responses if r.finished and (r.careful, r.right) == (careful, right)]
    cells = [
        "careful" if careful else "careless",
        "right" if right else "wrong",
        str(len(chosen)),
        mean(r.tokens for r in chosen),
        mean(r.tails for r in chosen),
    ]
    return f"| {' | '.join(cells)} |"


CARD = """# tiny

A base language model of {parameters:,} parameters, for trying reinforcement learning on a laptop:
`{architecture}`, {layers} layers of width {width}, context {context}, float32, with a byte-level
BPE tokenizer of {vocab} tokens (any text can be encoded; every digit is a token). It was trained
from scratch on nothing but text that its script makes, the diet `{diet}`: {levels} word problems of
the training split of the built-in `arithmetic` questions, with careful and careless solutions. In
`mixed` they stand in the R1 template, in the Qwen-Math template or bare; in `qa` they are bare; in
`text` those with a solution stand in a template, and bare ones follow one another. It
knows nothing else, has seen no text longer than about 300 tokens, and is no instruction follower.
Licence: MIT, as the package.

A careful solution works step by step; a careless one guesses, is shorter, and mostly wrong. The
first words show which it is. After the result follow sentences that repeat and never revise it.

## Recipe

`python examples/pretrain_tiny.py --diet {diet} --steps {steps} --seed {seed}` took
{minutes:.0f} minutes on {threads} CPU threads. Final loss: {loss:.3f} nats a token.

- Data: {first:,} short documents (a one-step question and its sum{exercise}), then,
  without end, documents of these kinds: {formats}. No question
  has a held-out expression; one step of a longer training problem may equal a held-out sum.
- Careful solutions: {careful}. They are right {careful_accuracy:.0%} of the time (the others slip
  in the last step), careless ones {careless_accuracy:.0%} (the others are a random number).
- Each further sentence after the result has probability {tail}, whatever was said before.
- Loss: cross-entropy on all of a completion; on the prompt of one document in {prompt_loss:.0f}.
- {steps} steps of about {batch_tokens} tokens; AdamW (0.9, 0.95), weight decay 0.1, learning rate
  {lr} after {warmup} steps of warm-up, cosine to zero, gradient norm at most 1.

## Measured

Temperature 1, at most {budget} new tokens, {questions} held-out questions x {samples} responses.
Lengths are mean tokens, without the EOS.

| template | accuracy | pass@{samples} | truncated | length, right | length, wrong | careful | \
accuracy, careful | accuracy, careless |
|---|---|---|---|---|---|---|---|---|
{template_rows}

With the R1 template, by style and outcome (finished responses):

| style | result | responses | length | tail sentences |
|---|---|---|---|---|
{style_rows}
"""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="runs/tiny", show_default=True)
@click.option("--steps", default=5000, show_default=True, help="Optimiser steps.")
@click.option("--seed", default=0, show_default=True)
@click.option("--diet", type=click.Choice(list(DIETS)), default="mixed", show_default=True)
@click.option("--eval-questions", default=512, show_default=True, type=click.IntRange(1))
def main(out: Path, steps: int, seed: int, diet: str, eval_questions: int) -> None:
    """Pretrain the tiny base model and write its folder, with a model card, to OUT."""
    torch.manual_seed(seed)
    corpus = itertools.islice(
        documents(seed, DIETS[diet]), FIRST_DOCUMENTS, FIRST_DOCUMENTS + CHUNK_DOCUMENTS
    )
    tokenizer = train_tokenizer(list(corpus))
    model = make_model(tokenizer)
    if diet != "mixed":  # which keeps the arithmetic that the shipped model was made with
        use_onednn(model)
    start = time.monotonic()
    loss = train(model, tokenizer, steps, seed, DIETS[diet])
    minutes = (time.monotonic() - start) / 60
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    heldout = arithmetic_questions("heldout", level=DIETS[diet].level, size=eval_questions)
    responses = {
        name: sample(model, tokenizer, template, heldout) for name, template in TEMPLATES.items()
    }
    card = CARD.format(
        parameters=model.num_parameters(),
        architecture=type(model).__name__,
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        context=model.config.max_position_embeddings,
        vocab=VOCAB_SIZE,
        diet=diet,
        levels=f"level-{DIETS[diet].level}" if DIETS[diet].level else "all",
        steps=steps,
        seed=seed,
        first=FIRST_DOCUMENTS,
        exercise="" if DIETS[diet].first is NONE else ", named as an exercise",
        prompt_loss=1 / PROMPT_LOSS_SHARE,
        batch_tokens=BATCH_TOKENS,
        lr=LEARNING_RATE,
        warmup=WARMUP_STEPS,
        minutes=minutes,
        threads=torch.get_num_threads(),
        loss=loss,
        formats=", ".join(f"{name} {share:.0%}" for name, share in DIETS[diet].formats.items()),
        careful=", ".join(f"{name} {share:.0%}" for name, share in CAREFUL_SHARE.items()),
        careful_accuracy=CAREFUL_ACCURACY,
        careless_accuracy=CARELESS_ACCURACY,
        tail=TAIL_PROBABILITY,
        budget=MAX_NEW_TOKENS,
        questions=eval_questions,
        samples=EVAL_SAMPLES,
        template_rows="\n".join(template_row(name, rows) for name, rows in responses.items()),
        style_rows="\n".join(
            style_row(careful, right, responses[R1.name])
            for careful, right in itertools.product((True, False), repeat=2)
        ),
    )
    (out / "README.md").write_text(card)
    click.echo(card)
    click.echo(f"The model is in {out}")


if __name__ == "__main__":
    main()
