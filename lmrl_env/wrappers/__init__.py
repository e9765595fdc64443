"""Wrappers around the token MDP, one thing each."""

from lmrl_env.wrappers.format_reward import FormatReward
from lmrl_env.wrappers.length_penalty import LengthPenalty
from lmrl_env.wrappers.outcome_reward import OutcomeReward
from lmrl_env.wrappers.overlong_penalty import OverlongPenalty
from lmrl_env.wrappers.process_reward import ProcessReward
from lmrl_env.wrappers.python_tool import PythonTool
from lmrl_env.wrappers.repetition_penalty import RepetitionPenalty
from lmrl_env.wrappers.response_log import DisagreementLog, RecordResponses
from lmrl_env.wrappers.verifier_reward import VerifierReward
from lmrl_env.wrappers.weighted_rewards import WeightedRewards

__all__ = [
    "DisagreementLog",
    "FormatReward",
    "LengthPenalty",
    "OutcomeReward",
    "OverlongPenalty",
    "ProcessReward",
    "PythonTool",
    "RecordResponses",
    "RepetitionPenalty",
    "VerifierReward",
    "WeightedRewards",
]
