"""Your own reward: a verifier, a wrapper that pays it, an id, and an unchanged algorithm.

cd examples && python ../algos/dr_grpo.py --env custom_verifier:BriefMath-v0
"""

import gymnasium as gym

from lmrl_env import Verdict, make_token_vector_env
from lmrl_env.verifiers import answer_tag_math
from lmrl_env.wrappers import VerifierReward


def brief_and_right(response, answer, *, question=None) -> Verdict:
    """Pay 1 for a right answer in at most 100 characters, half for a longer one."""
    verdict = answer_tag_math(response, answer, question=question)
    return verdict._replace(score=verdict.score if len(response) <= 100 else verdict.score / 2)


def make_envs(num_envs=1, **kwargs) -> VerifierReward:
    """Build the token MDP of any model and question set, with that reward."""
    return VerifierReward(make_token_vector_env(num_envs, **kwargs), brief_and_right)


gym.register(id="BriefMath-v0", vector_entry_point=make_envs, kwargs={"template": "r1"})
