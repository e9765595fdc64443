"""What the Tab key offers as the value of an option or argument."""

from __future__ import annotations

import click


def complete_verifier(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Return the verifiers of the library that begin with a text."""
    from lmrl_env.verifiers import NAMES

    return [name for name in NAMES if name.startswith(text)]


def complete_template(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Return the templates that begin with a text."""
    from lmrl_env.templates import TEMPLATES

    return [name for name in (*TEMPLATES, "chat") if name.startswith(text)]


def complete_questions(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Return the question sets that begin with what stands behind the last comma of a text."""
    from lmrl_env.questions import NAMED_SETS

    before, comma, begun = text.rpartition(",")
    return [before + comma + n for n in ("arithmetic", *NAMED_SETS) if n.startswith(begun)]
