"""The three steps of RLHF on the embedded world, and their report."""
