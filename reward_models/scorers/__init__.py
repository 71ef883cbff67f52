"""Reward models: rules, learned models, and combinations of others."""
