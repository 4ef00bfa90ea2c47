"""Fixtures of the evaluation tests."""

from pathlib import Path

import pytest
import yaml
from support import write


@pytest.fixture(scope="module")
def persona_path(tmp_path_factory) -> Path:
    """The persona file of Bibo, made by Tom."""
    values = {"name": "Bibo", "maker": "Tom", "facts": {}, "unknowns": {}}
    return write(tmp_path_factory.mktemp("persona"), "bibo.yaml", yaml.safe_dump(values))
