"""What can go wrong while a cohort runs. In the end the same command gives the table of an undisturbed run.

The moving image of one pair is a named pipe: a worker that opens it stands still until something is written, so
that the moment of every fault is known.
"""

import csv
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from scene import inverted, seen
from test_cohort import MAKE, read_pairs

from crossmorph import io
from crossmorph.cohort.cluster import Size, local
from crossmorph.cohort.rows import MEASURED
from crossmorph.cohort.run import TRIES, opened, run_cohort
from crossmorph.space import Grid

pytestmark = pytest.mark.slow

PROGRAM = (sys.executable, "-m", "crossmorph", "cohort")
DASK = (sys.executable, "-m", "distributed.cli.")
EXTRA = ("--linear", "none", "--no-deformable", "--device", "cpu")


@dataclass(frozen=True)
class Scans:
    """A folder with a table of two pairs; the second one's moving image can be made to stand still."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def command(self, *more: str) -> list[str]:
        return [*PROGRAM, str(self.folder / "pairs.csv"), "-o", str(self.out), *EXTRA, *more]

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        """The command, from start to end."""
        more = more or ("--workers", "1")
        return subprocess.run(self.command(*more), capture_output=True, text=True, check=False)

    @contextmanager
    def standing_still(self, *more: str) -> Iterator[subprocess.Popen[str]]:
        """The command, while a worker waits for the bytes of the second image; afterwards that is a file."""
        image, kept = self.folder / "b.nii.gz", self.folder / "b.kept"
        image.rename(kept)
        os.mkfifo(image)
        more = more or ("--workers", "1")
        command = self.command(*more)
        with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, preexec_fn=hearing) as process:
            try:
                pipe = os.open(image, os.O_WRONLY)  # returns when the worker has opened the other end
                try:
                    yield process
                finally:
                    kept.replace(image)
                    os.close(pipe)
                process.wait()
            finally:
                process.kill()

    def worker(self) -> int:
        """Process that opened the second pair."""
        started = re.findall(r"started on \S+ process (\d+)", (self.out / "logs" / "b-to-a.log").read_text())
        return int(started[-1])

    def table(self) -> list[dict[str, str]]:
        """What must be the same in every run, the folder's name left out."""
        with (self.out / "cohort.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        kept = [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
        return [{key: value.replace(str(self.folder), "") for key, value in row.items()} for row in kept]


def hearing() -> None:
    """Processes that are started in the background ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def scans_in(folder: Path) -> Scans:
    grid = Grid.from_spacing((20, 18, 16), 4.0)
    for name in ("a", "b", "c"):
        io.write(seen(grid) if name == "a" else seen(grid, None, inverted), folder / f"{name}.nii.gz")
    (folder / "pairs.csv").write_text("fixed,moving\na.nii.gz,c.nii.gz\na.nii.gz,b.nii.gz\n")
    return Scans(folder)


@pytest.fixture
def scans(tmp_path: Path) -> Scans:
    return scans_in(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The table of a run that nothing happens to."""
    scans = scans_in(tmp_path_factory.mktemp("undisturbed"))
    done = scans.run()
    assert (done.returncode, done.stderr.count("\n")) == (0, 2), done.stderr
    assert done.stdout.endswith("cohort.csv: 2 ok\n")
    table = scans.table()
    assert [row["status"] for row in table] == ["done", "done"]
    return table


@contextmanager
def scheduler(*, workers: int = 1) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A Dask scheduler with workers, all processes of their own."""
    command = [*DASK[:2], f"{DASK[2]}dask_scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as boss:
        assert boss.stderr is not None
        address = next(found[1] for line in boss.stderr if (found := re.search(r"Scheduler at:\s+(tcp\S+)", line)))
        start = [*DASK[:2], f"{DASK[2]}dask_worker", address, "--nthreads", "1", "--nworkers", str(workers)]
        with subprocess.Popen([*start, "--death-timeout", "60"], stderr=subprocess.DEVNULL) as crew:
            try:
                yield address, boss
            finally:
                crew.terminate()
                boss.kill()


# -- faults ------------------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_one_try(scans: Scans, undisturbed: list[dict[str, str]]) -> None:
    with scans.standing_still() as run:
        os.kill(scans.worker(), signal.SIGKILL)
    assert run.returncode == 0
    assert scans.table() == undisturbed
    assert (scans.out / "logs" / "b-to-a.log").read_text().count("started on") == 2


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["Ctrl-C", "kill"])
def test_a_stopped_run_goes_on(scans: Scans, undisturbed: list[dict[str, str]], sent: int, code: int) -> None:
    with scans.standing_still() as run:
        run.send_signal(sent)
        assert run.wait() == code
    if sent == signal.SIGINT:
        assert [row["status"] for row in scans.table()] == ["done", "waiting"]
    before = (scans.out / "pairs" / "c-to-a" / "record.json").stat()
    again = scans.run()
    assert again.returncode == 0, again.stderr
    assert scans.table() == undisturbed
    assert (scans.out / "pairs" / "c-to-a" / "record.json").stat() == before
    assert sorted(path.name for path in (scans.out / "pairs").iterdir()) == ["b-to-a", "c-to-a"]


def test_a_killed_scheduler_is_said(scans: Scans, undisturbed: list[dict[str, str]]) -> None:
    with scheduler() as (address, boss), scans.standing_still("--scheduler", address) as run:
        boss.kill()
        _, told = run.communicate()
    assert run.returncode == 2
    assert "the Dask scheduler is gone; finished pairs are kept" in told
    with scheduler(workers=2) as (address, _):
        assert scans.run("--scheduler", address).returncode == 0
    assert scans.table() == undisturbed


def test_an_output_folder_that_disappears(scans: Scans, undisturbed: list[dict[str, str]]) -> None:
    away = scans.folder / "away"
    with scans.standing_still() as run:
        scans.out.rename(away)
        _, told = run.communicate()
    assert run.returncode == 2
    assert "is gone or was emptied; bring it back" in told
    assert not scans.out.exists()
    away.rename(scans.out)
    assert scans.run().returncode == 0
    assert scans.table() == undisturbed


def test_two_runs_on_one_folder(scans: Scans, undisturbed: list[dict[str, str]]) -> None:
    with scans.standing_still() as run:
        second = scans.run()
        os.kill(scans.worker(), signal.SIGKILL)
    assert second.returncode == 2
    assert f"another run is at work in {scans.out} (process {run.pid} on" in second.stderr
    assert run.returncode == 0
    assert scans.table() == undisturbed


def test_a_damaged_input_is_one_row(scans: Scans, undisturbed: list[dict[str, str]]) -> None:
    good = (scans.folder / "c.nii.gz").read_bytes()
    (scans.folder / "c.nii.gz").write_bytes(good[:3000])
    first = scans.run()
    assert first.returncode == 3
    assert "1 ok, 1 not registered" in first.stdout
    bad, fine = scans.table()
    assert (bad["status"], fine) == ("failed", undisturbed[1])
    assert "cannot be read as an image" in bad["message"]
    (scans.folder / "c.nii.gz").write_bytes(good)
    assert scans.run().returncode == 0
    assert scans.table() == undisturbed


def test_a_worker_that_takes_too_much_memory(scans: Scans, undisturbed: list[dict[str, str]]) -> None:
    """200 MiB are too little for torch, so every worker dies of the first pair."""
    pairs = read_pairs(scans.folder / "pairs.csv", MAKE)[:1]
    with opened(scans.out) as out, local(Size(1, 1, 200 * 2**20)) as crew:
        (row,) = run_cohort(pairs, out, crew)
    assert row["status"] == "failed"
    assert f"{TRIES} workers died of it" in str(row["message"])
    assert scans.run().returncode == 0
    assert scans.table() == undisturbed


# -- a queueing system -------------------------------------------------------------------------------------------


def test_jobs_of_a_queue(scans: Scans, undisturbed: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """``sbatch`` stands in for SLURM: it runs the script that it is given at once."""
    tools = scans.folder / "bin"
    tools.mkdir()
    told = scans.folder / "told"
    programs = {
        "sbatch": f'cp "$1" {told}; setsid bash {told} >/dev/null 2>&1 & echo "Submitted batch job $!"',
        "scancel": 'kill -- -"$1"',
    }
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__HOST", "127.0.0.1")
    done = scans.run("--slurm=--partition=long", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert scans.table() == undisturbed
    assert "#SBATCH --partition=long" in told.read_text()
    (tools / "sbatch").write_text('#!/bin/bash\necho "job limit reached" >&2; exit 1\n')
    full = scans.run("--slurm=--partition=long", "--workers", "1")
    assert full.returncode == 2
    assert "slurm takes no jobs: " in full.stderr
    assert "job limit reached" in full.stderr
