"""Training a reward model on rankings."""
