"""The errors that this library raises.

Every message names the value that was given, what was expected, and what to do next.
"""

from __future__ import annotations

import gymnasium.error


class LmrlError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigurationError(LmrlError, ValueError):
    """An argument, or a combination of arguments, that cannot be meant."""


class UnknownNameError(ConfigurationError):
    """A template, engine, verifier or question set that nobody registered."""


class QuestionError(LmrlError, ValueError):
    """A question set that cannot be read, or a question that it does not hold."""


class PromptTooLongError(QuestionError):
    """A rendered prompt that leaves no room for a response in the model's context."""


class ModelError(LmrlError, ValueError):
    """A model or tokenizer that cannot be loaded or does not fit the job."""


class InvalidActionError(LmrlError, gymnasium.error.InvalidAction):
    """Actions of a wrong shape, dtype or range."""


class ResetNeededError(LmrlError, gymnasium.error.ResetNeeded):
    """A step or a fork before the first reset."""


class GradingError(LmrlError, RuntimeError):
    """The grading service cannot start, has been closed, or failed where that is not accepted."""


class EngineError(LmrlError, RuntimeError):
    """An engine that cannot start or does not answer."""


class WeightSyncError(EngineError):
    """The engine's log-probs and the trainer's disagree after a weight sync."""


class TrainingError(LmrlError, RuntimeError):
    """A run that cannot go on: gradients that stay not finite, memory that is not enough."""


class RankError(LmrlError, RuntimeError):
    """Another rank that ended, or did not come in time."""


class RunFolderError(LmrlError, RuntimeError):
    """A run's folder that is in use, cannot be written, or has no intact checkpoint."""
