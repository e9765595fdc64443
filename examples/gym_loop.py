"""The Gym loop: a language model acts in the token MDP, one token a step."""

import gymnasium as gym

import lmrl_env


def main() -> None:
    """Play eight episodes side by side, and show the first one."""
    envs = gym.make_vec("MathR1-v0", num_envs=8, render_mode="ansi", autoreset_mode="Disabled")
    observations, _ = envs.reset(seed=0)
    engine, one_token = envs.unwrapped.engine, lmrl_env.Sampling(max_new_tokens=1)
    finished = total = 0
    while finished < envs.num_envs:
        tokens, lengths = observations["input_ids"], observations["length"]
        states = [tokens[slot, : lengths[slot]].tolist() for slot in range(envs.num_envs)]
        seeds = [1000 * slot + int(lengths[slot]) for slot in range(envs.num_envs)]
        drawn = engine.generate(states, one_token, n=1, seeds=seeds)
        actions = [int(completion.token_ids[0]) for completion in drawn]
        observations, rewards, terminations, truncations, _ = envs.step(actions)
        finished += int((terminations | truncations).sum())
        total += rewards.sum()
    print(envs.render()[0])
    print(f"{total:.0f} of {envs.num_envs} answers were right")
    envs.close()


if __name__ == "__main__":
    main()
