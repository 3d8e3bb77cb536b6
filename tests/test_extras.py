"""What `pip install .[test]` brings is what the tests need to pass over nothing for want of a package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def test_the_extra_for_tests_holds_all_the_others() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (own,) = [match for match in (re.fullmatch(r"(\w+)\[(.+)\]", wanted) for wanted in extras["test"]) if match]
    assert own[1] == project["name"] and sorted(own[2].split(",")) == sorted(extras.keys() - {"test"})
