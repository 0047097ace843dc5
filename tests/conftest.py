"""Makes the modules of the repository importable from wherever pytest is started; fixtures for all."""
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
# What the smallest training run needs: every part of the loop, a second or two.
TINY = dict(batch=4, crop=32, period=2, validate=(1, 64), leaves=(2, 144))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a whole smoke run of the README's command."""
    import train
    out = tmp_path_factory.mktemp("run") / "smoke"
    train.main(["--arch", "restormer", "--seq", "--prompt", "--preset", "smoke", "--out", str(out)])
    return out


@pytest.fixture
def tiny(monkeypatch):
    """Shrinks the smoke preset for one test."""
    import train
    for key, value in TINY.items():
        monkeypatch.setitem(train.PRESETS["smoke"], key, value)
