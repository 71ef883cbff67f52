"""The package offers its entry points by name, and importing it stays light."""

import subprocess
import sys

import pytest

import reward_models


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, reward_models; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_of_the_package_is_found_and_no_other():
    for name in reward_models.__all__:
        assert getattr(reward_models, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        reward_models.train  # noqa: B018
