"""``lmrl envs``: the registered environments."""

from __future__ import annotations

from typing import Any

import click

from lmrl_env.cli.screen import print_json, print_table


@click.command("envs")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def envs_command(as_json: bool) -> None:
    """List the environment ids, with what each of them needs.

    \b
      lmrl envs
      python algos/dr_grpo.py --env MathQwen-v0
    """
    import gymnasium as gym

    import lmrl_env  # noqa: F401  (registers the ids)
    from lmrl_env.tables import Table
    from lmrl_env.templates import get_template
    from lmrl_env.verifiers import verifier_for

    rows: list[dict[str, Any]] = []
    for env_id, spec in gym.registry.items():
        if str(spec.entry_point).startswith("lmrl_env."):
            template = get_template(spec.kwargs["template"])
            rows.append(
                {
                    "id": env_id,
                    "template": template.name,
                    "stop": list(template.stop),
                    "verifier": getattr(verifier_for(template.answer_format), "__name__", ""),
                    "needs": "a model (default tiny) and questions (default arithmetic)",
                }
            )
    if as_json:
        print_json(rows)
        return
    cells = [
        [r["id"], r["template"], " ".join(r["stop"]) or "–", r["verifier"], r["needs"]]
        for r in rows
    ]
    print_table(Table("", ["id", "template", "stop", "verifier", "needs"], cells))
