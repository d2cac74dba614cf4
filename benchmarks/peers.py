"""Register the same cases with crossmorph and with other programs, and measure all of them in one way.

python benchmarks/peers.py truth15 -o OUT --start header --crossmorph-presets default convexadam

Every run is a process of its own that reads two volumes and writes a transform. Wall time and peak memory are
those of the process; accuracy and folding come from the data folder's score.py, which is no part of crossmorph.
For each case all programs run in turn, each case beginning with another one. OUT receives results.csv, report.md,
plot.png, run.json, and under runs/ the logs and records. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from cases import ROOT, SETS, TRUTH_CACHE, Case, data_folder
from tables import COLUMNS, Row, append_result, read_results, update_section, write_report
from tyro.conf import Positional, arg

HERE = Path(__file__).resolve().parent
PEERS = {"convexadam": "convexAdam", "elastix": "itk-elastix", "ants": "antspyx"}
"""Peers and the packages that bring them."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


@dataclass(frozen=True)
class Tool:
    """A program to measure.

    Attributes:
        name: in all tables.
        command: from a case and an empty folder to the command line.
        transform: file in that folder that the command leaves.
    """

    name: str
    command: Callable[[Case, Path], list[str]]
    transform: str


@dataclass(frozen=True)
class Peers:
    """Run crossmorph and other programs side by side."""

    cases: Positional[Literal["brain", "truth15", "pairs", "truth", "poses"]]
    """Which cases: see benchmarks/cases.py."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """Folder for tables, plot and logs."""

    start: Literal["header", "own"] = "own"
    """header: for everybody deformation alone, from the world coordinates. own: each program's linear stages."""

    only: str = ""
    """Regular expression: only the cases whose id it finds."""

    peers: tuple[Literal["convexadam", "elastix", "ants"], ...] = ("convexadam", "elastix", "ants")
    """Other programs to run."""

    crossmorph_presets: tuple[str, ...] = ("default",)
    """Presets of crossmorph (or settings files, .toml), each a program of its own in the tables."""

    peers_python: Path = HERE / ".venv-peers" / "bin" / "python"
    """Interpreter of the environment that `make bench-setup` makes."""

    truth_cache: Path = TRUTH_CACHE
    """Where cases with known truth are kept."""

    threads: int = os.cpu_count() or 1
    """Threads that every program may use."""

    warm_up: bool = True
    """Before measuring, let every program register a tiny pair: files are in memory, kernels are compiled."""

    keep: bool = False
    """Keep the transforms and volumes of every run; some hundred MB each."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace by the tables."""

    def run(self) -> None:
        """Measure what is missing and write everything."""
        data = data_folder()
        chosen = [c for c in SETS[self.cases](data, self.truth_cache) if re.search(self.only, c.id)]
        if not chosen:
            sys.exit(f"no case of {self.cases} matches {self.only}")
        tools = self.tools()
        self.output.mkdir(parents=True, exist_ok=True)
        self._check_record()
        if self.warm_up:
            self._warm_up(tools)
        measure_all(chosen, tools, self.output, self.threads, data / "score.py", self.keep)
        text = write_report(self.output)
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", self.update_readme, text)

    def tools(self) -> list[Tool]:
        """The programs in the order of the first case."""
        if self.peers and not self.peers_python.is_file():
            sys.exit(
                f"no interpreter at {self.peers_python}: run `make bench-setup`, or name one by --peers-python"
            )
        stages = ["--linear", "none"] if self.start == "header" else []
        if self.cases == "poses":
            stages = ["--linear", "rigid", "--no-deformable"]
        own = [crossmorph_tool(preset, stages) for preset in self.crossmorph_presets]
        return own + [peer_tool(name, self.peers_python, self.start) for name in self.peers]

    def _check_record(self) -> None:
        """Write run.json, or refuse to mix runs made under other conditions."""
        conditions: dict[str, Any] = {"cases": self.cases, "start": self.start, "threads": self.threads}
        conditions |= {"versions": versions(self.peers_python, self.peers)}
        file = self.output / "run.json"
        if file.is_file():
            earlier = json.loads(file.read_text())["conditions"]
            if earlier != conditions:
                sys.exit(f"{self.output} was begun with {earlier}, not {conditions}; choose another folder")
        words = [self.cases, "--start", self.start, "--peers", *self.peers]
        words += ["--crossmorph-presets", *self.crossmorph_presets, *(("--only", self.only) if self.only else ())]
        record = {
            "conditions": conditions,
            "command": shlex.join(["python", "benchmarks/peers.py", *words]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
        }
        file.write_text(json.dumps(record, indent=2) + "\n")

    def _warm_up(self, tools: Sequence[Tool]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            case = tiny_case(Path(folder))
            for tool in tools:
                row = register(tool, case, Path(folder) / tool.name, self.threads)
                print(f"warm-up {tool.name}: {row.get('error') or 'done'}", flush=True)


# -- programs ----------------------------------------------------------------------------------------------------


def crossmorph_tool(preset: str, stages: Sequence[str] = ()) -> Tool:
    """crossmorph under a preset, or under a settings file; ``stages``: options that choose what it runs."""
    is_file = preset.endswith(".toml")
    settings = ["--settings", str(Path(preset).resolve())] if is_file else ["--preset", preset]
    program = str(Path(sys.executable).with_name("crossmorph"))

    def command(case: Case, folder: Path) -> list[str]:
        volumes = [str(case.fixed), str(case.moving)]
        return [program, "register", *volumes, "-o", str(folder / "out"), *settings, *stages, "--quiet"]

    return Tool(f"crossmorph-{Path(preset).stem if is_file else preset}", command, "out/forward.h5")


def peer_tool(name: str, python: Path, start: str) -> Tool:
    """One of ``PEERS``, run by a script in benchmarks/peers."""
    script = str(HERE / "peers" / f"run_{name}.py")

    def command(case: Case, folder: Path) -> list[str]:
        volumes = [str(case.fixed), str(case.moving), str(folder / "forward.h5")]
        return [str(python), script, *volumes, "--kind", case.kind, "--start", start]

    return Tool(name, command, "forward.h5")


def versions(python: Path, peers: Sequence[str]) -> dict[str, str]:
    """Program to version; of crossmorph also the commit, with -dirty where files were changed since."""
    ask = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"

    def packages(interpreter: str, *names: str) -> list[str]:
        command = [interpreter, "-c", ask, *names]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    own = packages(sys.executable, "crossmorph", "torch")
    found = {"crossmorph": " ".join([own[0], commit.stdout.strip()]).strip(), "torch": own[1]}
    if peers:
        wanted = [PEERS[name] for name in peers]
        found |= dict(zip(wanted, packages(str(python), *wanted), strict=True))
    return found


def machine() -> str:
    """Processor, cores and memory in words."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model[1] if model else os.uname().machine}, {os.cpu_count()} cores, {memory:.0f} GiB"


# -- measuring ---------------------------------------------------------------------------------------------------


def measure_all(
    cases: Sequence[Case], tools: Sequence[Tool], out: Path, threads: int, score_py: Path, keep: bool
) -> None:
    """Append to results.csv what it does not hold yet; the unregistered start is a row of each case."""
    results = out / "results.csv"
    done = {(row["case"], row["tool"]) for row in read_results(results)}
    for number, case in enumerate(cases):
        if (case.id, "start") not in done:
            append_result(results, {"case": case.id, "kind": case.kind, "tool": "start", **score(score_py, case)})
        turn = number % len(tools)
        for tool in [*tools[turn:], *tools[:turn]]:
            if (case.id, tool.name) in done:
                continue
            folder = out / "runs" / case.id / tool.name
            row = register(tool, case, folder, threads)
            if not row.get("error"):
                row |= score(score_py, case, folder / tool.transform)
            append_result(results, row)
            for file in () if keep else [*folder.rglob("*.h5"), *folder.rglob("*.nii.gz")]:
                file.unlink()
            print(
                f"{number + 1}/{len(cases)} {case.id} {tool.name}: {row.get('error') or _words(row)}", flush=True
            )


def register(tool: Tool, case: Case, folder: Path, threads: int) -> Row:
    """Run one program on one case; seconds, peak memory, and an error where it left no transform."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row: Row = {"case": case.id, "kind": case.kind, "tool": tool.name}
    code, row["seconds"], row["peak_mib"] = run_measured(tool.command(case, folder), folder / "log.txt", threads)
    if not (folder / tool.transform).is_file():
        last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        row["error"] = f"exit code {code}: {''.join(last)[:200]}"
    return row


def run_measured(command: Sequence[str], log: Path, threads: int) -> tuple[int, float, float]:
    """Exit code, wall seconds and peak resident memory in MiB of a process (its largest child included).

    The peak counts what this process itself holds when it starts the child, so it must stay small: nothing heavy
    is imported before the last run.
    """
    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
    with log.open("wb") as stream:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return process.returncode, seconds, usage.ru_maxrss / unit


def score(score_py: Path, case: Case, transform: Path | None = None) -> Row:
    """What score.py says of a transform file, or of no registration."""
    command = [sys.executable, str(score_py), str(transform or "identity"), *case.truth]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {name: said[name] for name in COLUMNS if said.get(name) is not None}


def tiny_case(folder: Path) -> Case:
    """A smooth random volume and the same shifted by a voxel, 48^3."""
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import gaussian_filter

    data = gaussian_filter(np.random.default_rng(0).normal(size=(48, 48, 48)), 3).astype(np.float32)
    case = Case("tiny", "multi", folder / "fixed.nii.gz", folder / "moving.nii.gz", ())
    for file, volume in ((case.fixed, data), (case.moving, np.roll(data, 1, 0))):
        nib.Nifti1Image(1000 * volume, np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(file)
    return case


def _words(row: Row) -> str:
    names = ("tre_mean", "dice_mean", "fold_percent", "seconds", "peak_mib")
    return ", ".join(f"{name} {row[name]:.4g}" for name in names if name in row)


if __name__ == "__main__":
    tyro.cli(Peers, description=__doc__).run()
