"""One target in this process until it had its inputs: python fuzz/one.py TARGET INPUTS SEED FINDS STATE

atheris guides by the coverage of the Python code that reads. STATE is a JSON file of what was done so far, so that
it is known should the process die; libFuzzer then keeps the input in FINDS.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(
    include=["crossmorph.io", "crossmorph.evaluate.learn2reg", "crossmorph.train.checkpoint"]
):
    from targets import CORPUS, TARGETS, attempt

import torch
from mutate import mutated

SECONDS = 120
"""An input that takes longer hangs."""

MEMORY = 2**30
"""Bytes that reading may ask for on top of the libraries'."""

LONGEST = 16384
"""Bytes of an input."""

TELL = 500
"""Inputs from one writing of STATE to the next."""


def main(name: str, inputs: int, seed: int, finds: Path, state: Path) -> None:
    """Run libFuzzer, which ends the process."""
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-"))
    done = {"inputs": 0, "read": 0, "finds": 0}
    for number, parts in enumerate(target.seeds()):
        assert attempt(target, parts, folder), f"{name}: a valid file is refused"
        (corpus / str(number)).write_bytes(parts)
    for file in (CORPUS / name).glob("*"):
        shutil.copy(file, corpus)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    def one(parts: bytes) -> None:
        done["inputs"] += 1
        try:
            done["read"] += attempt(target, parts, folder)
        except Exception as error:
            done["finds"] += keep(finds / name, parts, error)
        if done["inputs"] % TELL == 0 or done["inputs"] >= inputs:
            state.write_text(json.dumps(done))

    def mutate(parts: bytes, longest: int, choice: int) -> bytes:
        random = Random(choice)
        changed = mutated(parts, random) if random.random() < 0.7 else atheris.Mutate(parts, longest)
        return changed[:longest]

    options = [
        f"-runs={inputs}",
        f"-seed={seed}",
        f"-max_len={LONGEST}",
        f"-timeout={SECONDS}",
        "-rss_limit_mb=2048",
    ]
    finds.mkdir(parents=True, exist_ok=True)
    atheris.Setup(
        ["fuzz", *options, f"-artifact_prefix={finds / name}-", "-verbosity=0", str(corpus)],
        one,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def keep(folder: Path, parts: bytes, error: Exception) -> bool:
    """Write the input and the traceback of a find, unless one of the same place is there; whether it is new."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__}-{Path(frame.filename).stem}-{frame.lineno}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / place
    if file.exists() and len(parts) >= file.stat().st_size:
        return False
    new = not file.exists()
    file.write_bytes(parts)
    (folder / f"{place}.log").write_text("".join(traceback.format_exception(error)))
    return new


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
