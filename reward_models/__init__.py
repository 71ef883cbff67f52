"""Reward models: preferences in, scalar scores out. Importing this package loads neither torch nor transformers."""
