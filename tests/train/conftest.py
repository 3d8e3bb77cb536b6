"""What tests of runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import config_of

from grasp_sparse.train.run import start_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, to be compared with; whoever changes it copies it first."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start_run(config_of(), folder)
    return folder
