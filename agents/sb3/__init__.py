"""Stable-Baselines3 on text environments: a language model as a policy, and N episodes as one of its environments."""

from agents.sb3.env import CausalLMPolicy, TextVecEnv, TokenEmbedding, TokenSpace, make_vec_env

__all__ = ["CausalLMPolicy", "TextVecEnv", "TokenEmbedding", "TokenSpace", "make_vec_env"]
