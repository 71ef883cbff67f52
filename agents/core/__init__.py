"""What the algorithms share: episodes, returns, losses, the gradient step."""
