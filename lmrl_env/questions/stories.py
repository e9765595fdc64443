"""The wordings of the built-in word problems: persons, objects and kinds of story."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Situation(NamedTuple):
    """The sentences of one kind of story, from which a problem draws one at each point.

    ``{name}`` is the first person and ``{things}`` the objects; in ``change`` and ``ask``,
    ``{last}`` is the person whom the story has reached, and ``{friend}`` the next one.

    Attributes:
        start: states the first number, ``{a}``.
        change: by operator, tells a step with the number ``{b}``.
        ask: the question at the end.
        start_and_change: by operator, states the first number and tells the first step.
    """

    start: tuple[str, ...]
    change: Mapping[str, tuple[str, ...]]
    ask: tuple[str, ...]
    start_and_change: Mapping[str, tuple[str, ...]] = MappingProxyType({})


NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Paul",
    "Sam",
)
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "toys")

SITUATIONS = (
    Situation(
        start=(
            "{name} has {a} {things}.",
            "{name} starts with {a} {things}.",
            "In the morning {name} has {a} {things}.",
        ),
        start_and_change={
            "+": ("{name} has {a} {things} at home and {b} at school.",),
            "-": ("Of {a} {things} that {name} had, {b} are lost.",),
            "*": (
                "{name} has {b} bags with {a} {things} in each.",
                "One box holds {a} {things}, and {name} has {b} boxes.",
            ),
            "/": (
                "{a} {things} are shared equally among {b} people, and {name} is one of them.",
                "{name} takes one of {b} equal boxes that hold {a} {things} together.",
            ),
        },
        change={
            "+": (
                "{friend} gives {name} {b} more.",
                "{name} finds {b} more.",
                "{name} buys {b} more {things}.",
                "Then {b} more are added.",
            ),
            "-": (
                "{name} gives {b} to {friend}.",
                "{name} loses {b} of them.",
                "{name} sells {b} {things}.",
                "Then {b} are taken away.",
            ),
            "*": (
                "Soon {name} has {b} times as many.",
                "{name} trades each one for {b} new {things}.",
            ),
            "/": (
                "{name} makes {b} equal piles and keeps one pile.",
                "They are shared equally among {b} people, and {name} is one of them.",
            ),
        },
        ask=(
            "How many {things} does {name} have now?",
            "How many {things} does {name} have in the end?",
        ),
    ),
    Situation(
        start=("{name} has {a} {things}.", "{name} owns {a} {things}."),
        change={
            "+": ("{friend} has {b} more than {last}.", "{friend} has {b} {things} more."),
            "-": ("{friend} has {b} fewer than {last}.", "{friend} has {b} {things} fewer."),
            "*": ("{friend} has {b} times as many as {last}.",),
            "/": ("{last} has {b} times as many as {friend}.",),
        },
        ask=("How many {things} does {last} have?", "What is the number of {things} of {last}?"),
    ),
    Situation(
        start=("{name} has {a} dollars.", "{name} has saved {a} dollars."),
        change={
            "+": ("{name} earns {b} dollars.", "{friend} pays {name} {b} dollars."),
            "-": ("{name} spends {b} dollars.", "{name} pays {friend} {b} dollars."),
            "*": ("The money grows to {b} times as much.", "Soon it is {b} times as much."),
            "/": (
                "{name} puts the money in {b} equal jars and keeps one jar.",
                "The money is shared equally among {b} people, and {name} is one of them.",
            ),
        },
        ask=(
            "How many dollars does {name} have in the end?",
            "How much money does {name} have now?",
        ),
    ),
    Situation(
        start=("A train starts with {a} people.", "There are {a} people on a train."),
        change={
            "+": ("At a stop {b} people get on.", "Then {b} more get on."),
            "-": ("At a stop {b} people get off.", "Then {b} get off."),
            "*": ("Soon there are {b} times as many people.",),
            "/": ("The people make {b} equal groups, and only one group stays.",),
        },
        ask=("How many people are on the train now?", "How many people are there in the end?"),
    ),
    Situation(
        start=("On Monday {name} reads {a} pages.", "{name} reads {a} pages on the first day."),
        change={
            "+": ("The next day it is {b} pages more.", "The day after {name} reads {b} more."),
            "-": ("The next day it is {b} pages fewer.", "The day after {name} reads {b} fewer."),
            "*": ("The next day it is {b} times as many.",),
            "/": ("The next day it is only 1/{b} of that.",),
        },
        ask=("How many pages does {name} read on the last day?", "How many pages is that?"),
    ),
    Situation(
        start=("Start with the number {a}.", "Take the number {a}."),
        change={
            "+": ("Add {b}.", "Then add {b} to it."),
            "-": ("Subtract {b}.", "Then take away {b} from it."),
            "*": ("Multiply by {b}.", "Then multiply it by {b}."),
            "/": ("Divide by {b}.", "Then divide it by {b}."),
        },
        ask=("What is the result?", "Which number comes out?"),
    ),
)
