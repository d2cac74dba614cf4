"""Fixtures and rules shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A busy machine makes deadlines meaningless; a check of a change must not depend on luck.
settings.register_profile("crossmorph", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("crossmorph")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real volumes: ``$CROSSMORPH_DATA``, else ``../shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CROSSMORPH_DATA") or beside)
    if not folder.is_dir():
        missing = f"no real volumes at {folder}; set CROSSMORPH_DATA to the folder that holds them"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return folder


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
