"""A folder in memory for a world's journal: the same SQLite, the same fsync, without a disk's patience."""

import tempfile
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def folder():
    """Where one world after the other keeps its journal."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as made:
        yield Path(made)
