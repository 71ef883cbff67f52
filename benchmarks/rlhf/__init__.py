"""The figures of ``textenv rlhf`` on a real model, of several seeds. ``python -m benchmarks.rlhf``."""
