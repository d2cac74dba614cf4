"""What a run did: seconds and memory a stage, notes, versions, inputs. It ends up in record.json."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the share of it that is done, 0 to 1."""

PACKAGES = ("crossmorph", "torch", "numpy", "scipy", "numba", "nibabel", "SimpleITK")


class Journal:
    """Collects what the stages of a run report and the hashes of the files it wrote, and passes progress on.

    Args:
        progress: called with (stage, share done); None for silence.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.stages: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self.outputs: dict[str, str] = {}
        self._progress = progress
        self._stage = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; ``peak_mib`` is the process's peak so far. A repeated name adds to its seconds."""
        start = time.perf_counter()
        self._stage = name
        self.progress(0.0)
        yield
        self.progress(1.0)
        seconds = time.perf_counter() - start
        entry = next((entry for entry in self.stages if entry["stage"] == name), None)
        if entry is None:
            entry = {"stage": name, "seconds": 0.0, "peak_mib": 0}
            self.stages.append(entry)
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["peak_mib"] = peak_mib()
        give_back()

    def progress(self, share: float) -> None:
        """Tell how much of the running stage is done."""
        if self._progress is not None:
            self._progress(self._stage, share)

    def note(self, key: str, value: Any) -> None:
        """Keep something worth knowing, such as an automatic choice."""
        self.notes[key] = value


def peak_mib() -> int:
    """Largest memory the process has had, in MiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (2**20 if sys.platform == "darwin" else 2**10))


def give_back() -> None:
    """Return freed memory to the system; glibc would keep a hundred MiB or two of it after each stage."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    if not path.is_dir():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """The processors a run could use."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), **gpu}


def processor() -> str:
    """Model of the processor, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
