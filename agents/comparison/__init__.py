"""Several models on one environment: their answers side by side, token by token."""
