"""What supervised training, reward training and RL share: the loop, checkpoints, progress, Ctrl-C."""
