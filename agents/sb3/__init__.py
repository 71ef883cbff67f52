"""Stable-Baselines3 on text environments: a language model as its policy, and N episodes as its environment."""

from agents.sb3.env import CausalLMPolicy, TextVecEnv, TokenEmbedding, TokenSpace, make_vec_env

__all__ = ["CausalLMPolicy", "TextVecEnv", "TokenEmbedding", "TokenSpace", "make_vec_env"]
