"""A tool: the model calls Python in the middle of a response, and reads what it prints.

python examples/python_tool.py

The tiny model never learned to call a tool, so a scripted engine writes here in its place. To
train a model that can: cd examples && python ../algos/dr_grpo.py --env python_tool:PythonMath-v0
"""

import gymnasium as gym
import numpy as np

from lmrl_env import Completion, make_token_vector_env
from lmrl_env.rollout import rollout
from lmrl_env.verifiers import answer_tag_math
from lmrl_env.wrappers import PythonTool, VerifierReward


def make_envs(num_envs=1, **kwargs) -> VerifierReward:
    """Build the token MDP of any model and question set, with a Python interpreter in it."""
    return VerifierReward(PythonTool(make_token_vector_env(num_envs, **kwargs)), answer_tag_math)


gym.register(id="PythonMath-v0", vector_entry_point=make_envs, kwargs={"template": "r1"})


class ScriptedEngine:
    """Calls Python for the gold answer, and then answers with what it read."""

    def __init__(self, tokenizer, gold):
        self.tokenizer, self.gold = tokenizer, gold

    def generate(self, prompt_ids, sampling, n, seeds):
        """Return the next turn of each response."""
        completions = []
        for prompt in prompt_ids:
            _, called, output = self.tokenizer.decode(prompt).partition("<output>\n")
            text = f"I let Python work.\n<python>print({self.gold} + 0)</python>"
            if called:
                text = f"So it is. </think> <answer>{output.splitlines()[0]}</answer>"
            token_ids = np.array(self.tokenizer.encode_text(text), dtype=np.int32)
            logprobs = np.zeros(len(token_ids), dtype=np.float32)
            completions.append(Completion(token_ids, logprobs, "stop", version=0))
        return completions


def main() -> None:
    envs = gym.make_vec(
        "PythonMath-v0", num_envs=1, max_new_tokens=128, tokens_per_step=128,
        autoreset_mode="Disabled",
    )  # fmt: skip
    tokenizer, question = envs.unwrapped.tokenizer, envs.unwrapped.prompts.questions[0]
    engine = ScriptedEngine(tokenizer, question.answer)
    batch = rollout(envs, engine, question_ids=[0], seeds=np.array([0]))
    print(question.question)
    print(batch.responses[0])
    length = batch.response_lengths[0]
    inserted = batch.response_ids[0, :length][~batch.mask[0, :length]]
    print(f"\nreward {batch.rewards[0]}, {batch.mask.sum()} actions")
    print(f"{len(inserted)} tokens that were inserted: {tokenizer.decode(inserted)!r}")
    envs.close()


if __name__ == "__main__":
    main()
