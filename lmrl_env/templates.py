"""Prompt templates: the one home of prompt text, stop strings and answer formats."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lmrl_env.errors import UnknownNameError

AnswerFormat = Literal["tag", "boxed", "either"]
"""Where the final answer stands: in ``<answer>`` tags, in the last ``\\boxed{}``, or either."""


class Template(NamedTuple):
    """A prompt around a question, and how a response to it ends and answers.

    Attributes:
        name: the name that ``template=`` takes.
        text: the prompt, with ``{question}`` once.
        stop: strings that end a response; they stay part of it.
        answer_format: where a verifier looks for the final answer.
    """

    name: str
    text: str
    stop: tuple[str, ...]
    answer_format: AnswerFormat

    def render(self, question: str) -> str:
        """Return the prompt for one question.

        >>> get_template("none").render("What is 1 + 1?")
        'What is 1 + 1?'
        """
        return self.text.replace("{question}", question, 1)


R1 = Template(
    name="r1",
    text=(
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {question}\nAssistant: <think>"
    ),
    stop=("</answer>",),
    answer_format="tag",
)
"""Template 1 of Liu et al. 2025, arXiv:2503.20783, after Guo et al. 2025, arXiv:2501.12948."""

QWEN_MATH = Template(
    name="qwen-math",
    text=(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ),
    stop=(),
    answer_format="boxed",
)
"""Template 2 of Liu et al. 2025, arXiv:2503.20783."""

NONE = Template(name="none", text="{question}", stop=(), answer_format="either")
"""Template 3 of Liu et al. 2025, arXiv:2503.20783: the bare question."""

TEMPLATES = {template.name: template for template in (R1, QWEN_MATH, NONE)}


def get_template(name: str) -> Template:
    """Return the template of that name.

    Raises:
        UnknownNameError: if there is none.
    """
    if name not in TEMPLATES:
        raise UnknownNameError(
            f"unknown template {name!r}: expected one of {sorted(TEMPLATES)}; a new one is a line "
            "in lmrl_env/templates.py"
        )
    return TEMPLATES[name]
