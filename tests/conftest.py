"""What several test modules share."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path

import pytest

from .mergekit_models import make_zoo

# Under nohup, or in the background of a script, the signals that tests send would be ignored by what they start, too.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tiny models; see ``mergekit_models``. Not to be written to."""
    folder: Path = tmp_path_factory.mktemp("zoo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others deprecate
        make_zoo(folder)
    return folder
