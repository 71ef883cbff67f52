"""What gives scores: rules, learned models, and reward models made of others."""
