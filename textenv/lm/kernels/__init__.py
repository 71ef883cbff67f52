"""Faster ways to the same numbers: :mod:`.layers` of a model, and :mod:`.attention` in bfloat16."""
