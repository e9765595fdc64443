"""Evaluation of a model on question sets: from names to graded samples."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmrl_env.errors import ConfigurationError, ModelError, UnknownNameError
from lmrl_env.grading import Grader
from lmrl_env.prompts import PromptTable
from lmrl_env.questions import NAMED_SETS, QuestionSet, load_questions
from lmrl_env.questions.grammar import parse_set
from lmrl_env.questions.sources import FILE_ENDINGS
from lmrl_env.registration import make_engine, resolve_engine
from lmrl_env.samples import Sample, grade
from lmrl_env.templates import TEMPLATES, Template
from lmrl_env.tokenizer import load_tokenizer, model_path
from lmrl_env.types import Completion, Question, Sampling

RESPONSES_AT_ONCE = {"local": 256, "vllm": 4096}
"""Responses that an engine is asked for in one call."""


class EvalSettings(NamedTuple):
    """How responses are drawn.

    Attributes:
        n: responses to each question.
        temperature: 0 is greedy.
        max_new_tokens: the budget of a response.
        engine: ``auto``, ``local`` or ``vllm``.
        dtype: of the computation.
        seed: of the samples.
    """

    n: int
    temperature: float
    max_new_tokens: int
    engine: str = "auto"
    dtype: str = "float32"
    seed: int = 0


def split_suite(text: str) -> list[str]:
    """Split the names of question sets at the commas that are not within a set's options.

    >>> split_suite("arithmetic:level=1,size=20,aime24,math500=copy.jsonl")
    ['arithmetic:level=1,size=20', 'aime24', 'math500=copy.jsonl']
    """
    names: list[str] = []
    for piece in text.split(","):
        key, equals, _ = piece.partition("=")
        if names and equals and key.isidentifier() and key not in NAMED_SETS:
            names[-1] += f",{piece}"
        else:
            names.append(piece.strip())
    return names


def load_suite(text: str, limit: int | None = None) -> dict[str, QuestionSet]:
    """Load question sets to evaluate on, whole; of ``arithmetic`` the held-out questions.

    Args:
        text: names of sets, see ``load_questions``, with commas between them.
        limit: most questions of a set, a choice that is always the same; None takes all.

    Returns:
        The sets by label: the name without the place of its copy, or the name of the file.

    Raises:
        ConfigurationError: if a set is named twice.
        QuestionError: if a set cannot be read.
    """
    suite: dict[str, QuestionSet] = {}
    for name in split_suite(text):
        label = _label(name)
        if label in suite:
            raise ConfigurationError(
                f"two sets of the suite {text!r} would be called {label!r}: name each set once, "
                "and give files different names"
            )
        questions = load_questions(
            name, split="heldout" if label.startswith("arithmetic") else "all"
        )
        if limit is not None and limit < len(questions):
            order = np.random.default_rng(0).permutation(len(questions))
            questions = questions.subset(sorted(order[:limit]))
        suite[label] = questions
    return suite


def _label(name: str) -> str:
    source = parse_set(name).source
    options = name[len(source) :]
    label = source.partition("=")[0]
    if label not in NAMED_SETS:
        label = source
        if source.endswith(FILE_ENDINGS):
            label = Path(source).name.removesuffix(".gz")
            label = label.removesuffix(Path(label).suffix)
    return label + options


def choose_template(name: str, model: str) -> Template:
    """Return the prompt template of an evaluation.

    Args:
        name: of a template; ``chat``, the model's own chat template with the question as the
            user's only message; or a text file that holds ``{question}`` once. The last two have
            no stop strings, and the answer may stand in tags or in a box.
        model: ``tiny``, a folder or a hub id.

    Raises:
        UnknownNameError: if the name is none of these.
        ConfigurationError: if the file does not hold ``{question}`` once.
        ModelError: if the model has no chat template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "chat":
        return Template("chat", _chat_text(model), stop=(), answer_format="either")
    path = Path(name)
    if not path.is_file():
        raise UnknownNameError(
            f"unknown template {name!r}: expected one of {', '.join(sorted(TEMPLATES))}, 'chat', "
            "or a text file with {question}"
        )
    text = path.read_text(encoding="utf-8")
    if text.count("{question}") != 1:
        raise ConfigurationError(
            f"the template file {name!r} holds {{question}} {text.count('{question}')} times: "
            "expected once, where the question goes"
        )
    return Template(path.stem, text, stop=(), answer_format="either")


def _chat_text(model: str) -> str:
    """Return the prompt of a model's chat template, with ``{question}`` as the message."""
    from transformers import AutoTokenizer

    load_tokenizer(model)  # names what is wrong with a model that cannot be loaded
    tokenizer = AutoTokenizer.from_pretrained(model_path(model))
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of the model {model!r} has no chat template: expected one for "
            "--template chat; take r1, qwen-math, none, or a file of your own"
        )
    message = [{"role": "user", "content": "{question}"}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    if text.count("{question}") != 1:
        raise ModelError(
            f"the chat template of the model {model!r} does not keep the user's message as it is: "
            "expected it once in the prompt; write the prompt into a file of your own"
        )
    begin = tokenizer.bos_token
    if begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(begin)  # the tokenizer puts it there itself
    return text


class SuitePrompts(NamedTuple):
    """The prompts of a suite for one model.

    Attributes:
        model: ``tiny``, a folder or a hub id.
        template: around the questions.
        tables: by label of the set; questions that do not fit the context are counted there.
    """

    model: str
    template: Template
    tables: Mapping[str, PromptTable]

    @classmethod
    def of(
        cls, model: str, template: Template, suite: Mapping[str, QuestionSet], max_new_tokens: int
    ) -> SuitePrompts:
        """Render and tokenise the questions of a suite."""
        tokenizer = load_tokenizer(model)
        return cls(
            model,
            template,
            {
                label: PromptTable(questions, template, tokenizer, max_new_tokens)
                for label, questions in suite.items()
            },
        )

    def __len__(self) -> int:
        return sum(map(len, self.tables.values()))


def sample_suite(
    prompts: SuitePrompts, settings: EvalSettings, grader: Grader
) -> Iterator[list[Sample]]:
    """Yield graded samples of a model, those to a question adjacent.

    A sample's seed depends on the seed of the evaluation, the set, the question and the sample's
    number alone: it is the same for every model, however many questions or samples there are.

    Args:
        prompts: of the model.
        settings: how to draw.
        grader: of the verifier.

    Raises:
        ConfigurationError: if the settings cannot be meant.
        EngineError: if the engine does not start.
    """
    sampling = Sampling(settings.max_new_tokens, settings.temperature, stop=prompts.template.stop)
    width = max(table.width for table in prompts.tables.values())
    engine = make_engine(
        settings.engine,
        prompts.model,
        max_model_len=width + settings.max_new_tokens,
        dtype=settings.dtype,
    )
    at_once = max(1, RESPONSES_AT_ONCE[resolve_engine(settings.engine)] // settings.n)
    try:
        for label, table in prompts.tables.items():
            for start in range(0, len(table), at_once):
                rows = range(start, min(start + at_once, len(table)))
                seeds = [s for i in rows for s in _seeds(settings, label, table.questions[i].id)]
                token_ids = [table[i].tolist() for i in rows]
                completions = engine.generate(token_ids, sampling, settings.n, seeds)
                asked = [(table.questions[i], j) for i in rows for j in range(settings.n)]
                samples = [
                    _sample(prompts, label, question, j, seed, completion)
                    for (question, j), seed, completion in zip(
                        asked, seeds, completions, strict=True
                    )
                ]
                yield grade(samples, grader)
    finally:
        engine.close()


def _sample(
    prompts: SuitePrompts,
    label: str,
    question: Question,
    number: int,
    seed: int,
    completion: Completion,
) -> Sample:
    return Sample(
        question_id=question.id,
        question=question.question,
        answer=question.answer,
        response=load_tokenizer(prompts.model).decode_response(completion.token_ids),
        finish_reason=completion.finish_reason,
        model=prompts.model,
        set=label,
        template=prompts.template.name,
        sample=number,
        seed=seed,
        tokens=len(completion.token_ids),
        extra=question.extra,
    )


def _seeds(settings: EvalSettings, label: str, question_id: str) -> list[int]:
    place = zlib.crc32(f"{label}/{question_id}".encode())
    random = np.random.default_rng((settings.seed, place))
    return random.integers(2**62, size=settings.n).tolist()
