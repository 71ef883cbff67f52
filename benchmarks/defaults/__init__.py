"""Do the default settings gain, whatever the reward? ``python -m benchmarks.defaults``."""
