"""How much memory a process has used."""

import sys


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process so far, 10⁶ bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
