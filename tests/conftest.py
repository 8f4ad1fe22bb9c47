"""What several test modules share."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from .mergekit_models import make_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tiny models; see ``mergekit_models``. Not to be written to."""
    folder: Path = tmp_path_factory.mktemp("zoo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others deprecate
        make_zoo(folder)
    return folder
