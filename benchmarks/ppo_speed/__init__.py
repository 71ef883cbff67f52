"""PPO here beside TRL's. Imports nothing: TRL's side runs in an environment that has none of our packages."""
