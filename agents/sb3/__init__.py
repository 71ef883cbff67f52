"""Stable-Baselines3 on text environments: a language model as its policy, and N episodes as its environment."""

from agents.sb3.env import TextVecEnv, make_vec_env
from agents.sb3.policy import CausalLMPolicy, TokenEmbedding, TokenSpace

__all__ = ["CausalLMPolicy", "TextVecEnv", "TokenEmbedding", "TokenSpace", "make_vec_env"]
