"""A Gymnasium environment for language models, and the tools to train in it.

>>> import gymnasium as gym
>>> import lmrl_env
>>> envs = gym.make_vec("MathR1-v0", num_envs=4, group_size=2)
>>> observations, info = envs.reset(seed=0)
>>> observations["input_ids"].shape[0], info["question_id"].shape
(4, (4,))
"""

from lmrl_env.env import TokenVectorEnv
from lmrl_env.errors import LmrlError
from lmrl_env.questions import QuestionSet, load_questions
from lmrl_env.registration import make_engine, make_token_vector_env, register_envs
from lmrl_env.templates import Template, get_template
from lmrl_env.token_env import TokenEnv
from lmrl_env.types import BatchTotals, Completion, Question, Sampling
from lmrl_env.verifiers import Verdict

__version__ = "0.1.0"

__all__ = [
    "BatchTotals",
    "Completion",
    "LmrlError",
    "Question",
    "QuestionSet",
    "Sampling",
    "Template",
    "TokenEnv",
    "TokenVectorEnv",
    "Verdict",
    "get_template",
    "load_questions",
    "make_engine",
    "make_token_vector_env",
    "register_envs",
]

register_envs()
