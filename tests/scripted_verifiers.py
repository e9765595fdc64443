"""Verifiers that misbehave on command: the response says how."""

import ctypes
import os
import signal
import sys
import time

from lmrl_env.verifiers import Verdict


def scripted(response, answer, *, question=None):
    command, _, argument = response.partition(" ")
    if command == "compute":  # for ever
        while True:
            pass
    elif command == "sleep":
        time.sleep(float(argument))
    elif command == "exit":
        os._exit(int(argument))
    elif command == "sys.exit":
        sys.exit(argument)
    elif command == "segfault":
        ctypes.string_at(0)
    elif command == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif command == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif command == "hog":
        return Verdict(1.0, "correct", str(len(bytearray(int(argument)))))
    elif command == "raise":
        raise ValueError(argument)
    elif command == "print":
        print("noise\n" * int(argument), flush=True)
        os.write(2, b"noise\n")
    elif command == "return":
        return {"none": None, "nan": Verdict(float("nan"), "correct"), "float": 1.0}[argument]
    elif command == "repeat":
        return Verdict(1.0, "correct", "x" * int(argument))
    elif command == "question":
        return Verdict(1.0, "correct", f"{question.id} {question.extra['level']} {question.answer}")
    elif command == "pid":
        return Verdict(1.0, "correct", str(os.getpid()))
    elif command == "busy":
        end = time.process_time() + float(argument)
        while time.process_time() < end:
            pass
    return Verdict(
        float(response == answer), "correct" if response == answer else "wrong", response
    )


def of_any_arguments(response, answer, *, question=None, **arguments):
    return Verdict(0.0, "wrong", repr(arguments))


def broken_helper(response, answer, *, question=None):
    raise NotImplementedError


def pays_for_the_row(response, answer, *, question=None):
    """Correct if the whole row of the question came along, its level included."""
    told = question is not None and question.answer == answer and "level" in question.extra
    return Verdict(float(told), "correct" if told else "wrong")
