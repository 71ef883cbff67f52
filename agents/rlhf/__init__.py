"""RLHF on a pretrained model and people's preferences, in one run."""
