"""Known vulnerabilities in what is installed, by pip-audit. Without a network nothing is checked: in CI a failure.

Command: ``make audit``, which gives pip-audit an environment of its own.
"""

import os
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from pathlib import Path

ADVISORIES = "https://pypi.org/pypi/jinja2/3.1.0/json"
"""Where pip-audit asks: an answer for a version with known vulnerabilities says that it can be reached."""


def main(python: str) -> int:
    """Audit the packages of the environment that ``python`` belongs to; the exit code is pip-audit's."""
    try:
        urllib.request.urlopen(ADVISORIES, timeout=10).close()
    except (urllib.error.URLError, OSError) as error:
        print(f"audit: no advisories from pypi.org ({error}), so nothing was checked.")
        return int("CI" in os.environ)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    auditor = Path(sysconfig.get_path("scripts"), "pip-audit")
    return subprocess.run([auditor, "--path", packages, "--skip-editable", "--progress-spinner", "off"]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
