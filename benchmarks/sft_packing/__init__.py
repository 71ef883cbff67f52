"""Supervised fine-tuning with and without padding."""
