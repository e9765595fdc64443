"""``lmrl verify``: one answer."""

from __future__ import annotations

import sys

import click

from lmrl_env.cli.completion import complete_verifier
from lmrl_env.cli.screen import print_json


@click.command("verify")
@click.argument("response")
@click.option(
    "--answer", "answers", multiple=True, required=True, help="gold; several if any will do"
)
@click.option(
    "--verifier",
    shell_complete=complete_verifier,
    default="math_answer",
    show_default=True,
    help="name, or module:function",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of text")
@click.pass_context
def verify_command(
    context: click.Context, response: str, answers: tuple[str, ...], verifier: str, as_json: bool
) -> None:
    """Grade one response, and explain the verdict.

    \b
      lmrl verify --answer 1/2 'So it is \\boxed{0.5}.'
      lmrl verify --answer 10 --verifier 'numeric(tolerance=0.1)' 'about 10.5'
      lmrl verify --answer 4 --verifier my_module:mine - < response.txt

    RESPONSE is the text, or - to read it from the standard input. The verifiers of the library
    are boxed_math, answer_tag_math, math_answer, last_number, numeric, exact, choice, regex, code
    and llm_judge.

    The exit code is 0 if the response is correct, and 1 if it is anything else.
    """
    from lmrl_env.grading import Grader
    from lmrl_env.quantities import plain_number

    text = sys.stdin.read() if response == "-" else response
    gold = answers[0] if len(answers) == 1 else answers
    with Grader(verifier, workers=1) as grader:
        (verdict,) = grader.grade([text], [gold])
    shown = {
        "status": verdict.status,
        "score": verdict.score,
        "extracted": verdict.extracted,
        "gold": list(answers),
        "detail": verdict.detail,
        "verifier": grader.verifier,
    }
    numbers = [plain_number(t) for t in (verdict.extracted or "", *answers)]
    if as_json:
        print_json({**shown, "numbers": [None if x is None else str(x) for x in numbers]})
    else:
        for key, value in {**shown, "gold": " or ".join(answers)}.items():
            if value not in (None, ""):
                click.echo(f"{key + ':':<11}{value}")
        for t, number in zip((verdict.extracted, *answers), numbers, strict=True):
            if number is not None:
                click.echo(f"           {t} is the number {number}")
    context.exit(0 if verdict.status == "correct" else 1)
