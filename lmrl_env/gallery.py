"""The claims of ``examples/paper/``: what their scripts wrote, as one page and as Markdown."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

from lmrl_env.errors import ConfigurationError

TEMPLATE = Path(__file__).parent / "assets" / "gallery.html"
VERDICTS = ("holds", "partly", "does not hold")


class Claim(NamedTuple):
    """A claim of the paper, and what became of it.

    Attributes:
        name: of the script.
        title: a few words.
        section: of the paper.
        claim: the paper's statement, Markdown as all that follows.
        measured: with figures and intervals.
        holds: ``holds``, ``partly`` or ``does not hold``.
        reason: why it came out so.
        tables: what stands below the verdict.
        seeds: how many, of which part.
        scale: ``tiny`` or ``paper``.
        minutes: that it took, with so many runs at one time as ``jobs``.
        jobs: see ``minutes``.
        command: that measures it again.
        date: of the measurement.
        commit: of the checkout.
        hardware: processor, cores and GPUs.
        picture: a PNG; None if it is missing.
    """

    name: str
    title: str
    section: str
    claim: str
    measured: str
    holds: str
    reason: str
    tables: str
    seeds: str
    scale: str
    minutes: float
    jobs: int
    command: str
    date: str
    commit: str | None
    hardware: str
    picture: Path | None

    @property
    def core_minutes(self) -> float:
        """That it keeps cores busy."""
        return self.minutes * self.jobs

    @property
    def duration(self) -> str:
        """How long it takes on two cores."""
        return f"{self.core_minutes / 2:.0f} min" if self.core_minutes >= 2 else "< 1 min"


def read_claims(folder: Path) -> list[Claim]:
    """Read what the scripts wrote, in the order of the paper's sections.

    Args:
        folder: with ``NAME.json``, ``NAME.md`` and ``NAME.png`` of each.

    Raises:
        ConfigurationError: if a record is broken.
    """
    claims = [read_claim(path) for path in folder.glob("*.json")]
    return sorted(claims, key=lambda claim: (_place(claim.section), claim.name))


def _place(section: str) -> tuple[bool, list[int]]:
    """Return a key that puts §2.1 before §10, and what has no section of the paper last."""
    number = re.match(r"(?:§|sections?)\s*(\d+)(?:\.(\d+))?", section)
    return number is None, [int(part or 0) for part in number.groups()] if number else []


def read_claim(path: Path) -> Claim:
    """Read what one script wrote.

    Args:
        path: of its JSON.

    Raises:
        ConfigurationError: if the record is broken.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        verdict = record["verdict"]
        if verdict["holds"] not in VERDICTS:
            raise ValueError(f"verdict {verdict['holds']!r}, not one of {', '.join(VERDICTS)}")
        picture = path.with_suffix(".png")
        return Claim(
            name=record["name"],
            title=record["title"],
            **{key: verdict[key] for key in ("section", "claim", "measured", "holds", "reason")},
            tables=_tables(path.with_suffix(".md"), record),
            seeds=str(verdict["seeds"]),
            scale=record["scale"],
            minutes=float(record["minutes"]),
            jobs=int(record.get("jobs", 2)),
            command=record["command"],
            date=record["date"],
            commit=record["commit"],
            hardware=record["hardware"],
            picture=picture if picture.is_file() else None,
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigurationError(
            f"{str(path)!r} is no record of a claim ({type(error).__name__}: {error}): expected "
            "what a script of examples/paper/ writes; run it again, or remove the file"
        ) from error


def _tables(path: Path, record: Mapping[str, Any]) -> str:
    """Return what stands between verdict and picture in a script's Markdown, if it is there."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    verdict = record["verdict"]
    _, _, behind = text.partition(f"**Verdict: {verdict['holds']}.** {verdict['reason']}")
    return behind.rpartition(f"![{record['title']}]")[0].strip()


def claims_table(claims: Sequence[Claim], page: str = "") -> str:
    """Return the claims and their verdicts as a Markdown table, and how long all of them take.

    Args:
        claims: in their order.
        page: that has a heading for each of them; empty where it is the page itself.
    """
    rows = [
        f"| {_cell(claim.section)} | [{_cell(claim.title)}]({page}#{anchor(claim.title)}) "
        f"| **{claim.holds}** | {claim.duration} |"
        for claim in claims
    ]
    head = ["| source | claim | here | time |", "|---|---|---|---|"]
    total = sum(claim.core_minutes for claim in claims) / 2
    return "\n".join([*head, *rows, "", f"Together {total:.0f} minutes on two cores."])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def anchor(title: str) -> str:
    """Return the fragment that GitHub gives a heading.

    >>> anchor("Self-reflection (§2.3) before RL")
    'self-reflection-23-before-rl'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def between_marks(text: str, content: str) -> str:
    """Return a text with new content between its marks ``<!-- claims: begin -->`` and ``end``.

    Raises:
        ConfigurationError: if the marks are not there.
    """
    begin, end = "<!-- claims: begin -->", "<!-- claims: end -->"
    before, mark, rest = text.partition(begin)
    _, closing, after = rest.partition(end)
    if not mark or not closing:
        raise ConfigurationError(f"the page has no marks {begin} and {end}: expected one of each")
    return f"{before}{begin}\n{content}\n{end}{after}"


def details(claims: Sequence[Claim], pictures: str) -> str:
    """Return all claims as Markdown, with their table before them.

    Args:
        claims: in their order.
        pictures: path of their folder from the page that this is for.
    """
    parts = [claims_table(claims)]
    for claim in claims:
        parts += [
            f"## {claim.title}",
            f"**The paper ({claim.section}):** {claim.claim}",
            f"**Measured, {claim.scale} scale ({claim.seeds}):** {claim.measured}",
            f"**Verdict: {claim.holds}.** {claim.reason}".strip(),
            *([claim.tables] if claim.tables else []),
            f"![{claim.title}]({pictures}/{claim.name}.png)",
            f"`{claim.command}`, {claim.duration}",
        ]
    return "\n\n".join(parts)


def report(claims: Sequence[Claim], missing: Mapping[str, str]) -> str:
    """Return one HTML page that needs no other file, no network and no JavaScript.

    Args:
        claims: in their order.
        missing: scripts without a result, and what each of them is about.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["markdown"] = lambda text: Markup(markdown.render(text))
    page.filters["inline"] = lambda text: Markup(markdown.renderInline(text))
    page.filters["data_uri"] = _data_uri
    page.filters["slug"] = lambda text: text.replace(" ", "-")
    counts = {verdict: sum(c.holds == verdict for c in claims) for verdict in VERDICTS}
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        claims=claims, missing=missing, counts=counts
    )


def _data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
