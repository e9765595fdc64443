"""Verifiers with plain scores, and some that fail on command."""

from lmrl_env.verifiers import Verdict


def length(response, answer, *, question=None):
    """A tenth for each character; correct whatever it says."""
    return Verdict(len(response) / 10, "correct", response)


def has_x(response, answer, *, question=None):
    found = "x" in response
    return Verdict(float(found), "correct" if found else "wrong", "x" if found else None)


def has_y(response, answer, *, question=None):
    """As ``has_x``, and raises for a z."""
    if "z" in response:
        raise ValueError("z")
    found = "y" in response
    return Verdict(2.0 * found, "correct" if found else "wrong", "y" if found else None)


def fails_for_some_questions(response, answer, *, question=None):
    """Raise for a third of the questions, whatever was answered."""
    if int(question.id.rsplit("/")[-1]) % 3 == 0:
        raise RuntimeError("no verdict")
    odd = len(response) % 2
    return Verdict(float(odd), "correct" if odd else "wrong")
