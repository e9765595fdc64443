r"""The command ``lmrl``: evaluate, grade, plot, and look up what there is.

Its exit code is 0 if all went well, 1 for an error, and 2 for a wrong command line.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from lmrl_env.cli.compare import compare_command
from lmrl_env.cli.envs import envs_command
from lmrl_env.cli.eval import eval_command
from lmrl_env.cli.export import export_command
from lmrl_env.cli.paper import paper_command
from lmrl_env.cli.plot import plot_command
from lmrl_env.cli.questions import questions_group
from lmrl_env.cli.regrade import regrade_command
from lmrl_env.cli.serve import serve_command
from lmrl_env.cli.verify import verify_command
from lmrl_env.errors import LmrlError


class LmrlGroup(click.Group):
    """A group whose commands end with the message alone of an error of this library."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except LmrlError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=LmrlGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def main() -> None:
    """Evaluate language models, grade answers, and compare training runs.

    Every command has a --help with an example. A start:

    \b
      lmrl eval --model tiny --suite arithmetic --limit 100 --max-new-tokens 96
      lmrl verify --answer 1/2 'So it is \\boxed{0.5}.'
      lmrl questions list

    Exit codes: 0 if all went well, 1 for an error, 2 for a wrong command line.

    Completion of commands and options with the Tab key, in bash (zsh and fish likewise):

    \b
      eval "$(_LMRL_COMPLETE=bash_source lmrl)"
    """
    if os.getcwd() not in sys.path:  # where the module of a verifier such as my_module:mine may be
        sys.path.append(os.getcwd())


for command in (
    compare_command,
    envs_command,
    eval_command,
    export_command,
    paper_command,
    plot_command,
    questions_group,
    regrade_command,
    serve_command,
    verify_command,
):
    main.add_command(command)
