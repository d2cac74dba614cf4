"""Cohorts: tables of pairs, finished pairs, rows, the page, sizes of workers, and what is refused at once."""

import csv
import json
import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scene import NONE, inverted, seen

from crossmorph import io, plan
from crossmorph.cli import main
from crossmorph.cohort import cluster, memory
from crossmorph.cohort.cluster import Size, check_workers, connected, queue_cluster, worker_options
from crossmorph.cohort.memory import local_size, worker_bytes
from crossmorph.cohort.page import render
from crossmorph.cohort.pairs import Pair, read_pairs
from crossmorph.cohort.rows import COLUMNS, MEASURED, done_row, failed_row, suspicion, waiting_row, write_table
from crossmorph.cohort.run import opened
from crossmorph.cohort.work import LOGS, PAIRS, attempt, finished
from crossmorph.errors import InputError
from crossmorph.files import RECORD
from crossmorph.job import Job, from_request, same_work
from crossmorph.plan import GIB
from crossmorph.settings import Mcbo
from crossmorph.space import Grid
from crossmorph.transform import Affine

SMALL = Grid.from_spacing((20, 18, 16), 4.0)
MAKE = partial(Job, settings=Mcbo(NONE), deformable=False)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small volumes, a mask, a start and a damaged volume; read only."""
    folder = tmp_path_factory.mktemp("scans")
    for name, contrast in (("a", None), ("b", inverted), ("c", inverted)):
        io.write(seen(SMALL, None, contrast) if contrast else seen(SMALL), folder / f"{name}.nii.gz")
    io.write_transform(Affine.translation((1, 0, 0)), folder / "start.tfm")
    (folder / "bad.nii.gz").write_bytes((folder / "a.nii.gz").read_bytes()[:2000])
    return folder


@pytest.fixture
def table(scans: Path, tmp_path: Path) -> Path:
    """A table beside copies of the volumes."""
    shutil.copytree(scans, tmp_path / "scans")
    return tmp_path / "scans" / "pairs.csv"


def pairs_of(table: Path, text: str, **options: Any) -> list[Pair]:
    table.write_text(text)
    return read_pairs(table, MAKE, **options)


# -- tables ------------------------------------------------------------------------------------------------------


def test_rows_are_pairs(table: Path) -> None:
    one, two = pairs_of(
        table,
        "id,fixed,moving,initial,fixed_mask\nmine,a.nii.gz,b.nii.gz,start.tfm,a.nii.gz\n,b.nii.gz,a.nii.gz,,\n",
    )
    folder = table.parent
    assert one == Pair(
        "mine",
        MAKE(
            fixed=folder / "a.nii.gz",
            moving=(folder / "b.nii.gz",),
            initial=folder / "start.tfm",
            fixed_mask=folder / "a.nii.gz",
        ),
    )
    assert (two.id, two.job.initial) == ("a-to-b", None)


def test_volumes_go_to_a_template_or_to_each_other(table: Path) -> None:
    text = "image,mask\na.nii.gz,\nb.nii.gz,a.nii.gz\nc.nii.gz,\n"
    to = pairs_of(table, text, template=table.parent / "a.nii.gz")
    assert [pair.id for pair in to] == ["a-to-a", "b-to-a", "c-to-a"]
    assert [pair.job.moving_mask is not None for pair in to] == [False, True, False]
    each = pairs_of(table, text, all_pairs=True)
    assert sorted(pair.id for pair in each) == ["a-to-b", "a-to-c", "b-to-a", "b-to-c", "c-to-a", "c-to-b"]
    assert all((pair.job.fixed_mask is not None) == pair.id.endswith("to-b") for pair in each)


WRONG = {
    "all missing files": (
        "fixed,moving\na.nii.gz,no.nii.gz\nb.nii.gz,c.nii.gz\nnone.nii.gz,a.nii.gz\n",
        {},
        r"(?s)row 2: there is no file \S+no.nii.gz.*row 4: there is no file \S+none.nii.gz",
    ),
    "one folder twice": (
        "id,fixed,moving\nx,a.nii.gz,b.nii.gz\nX,b.nii.gz,a.nii.gz\n",
        {},
        r"one output folder, x \(a.nii.gz, b.nii.gz\), X \(b.nii.gz, a.nii.gz\)",
    ),
    "a folder elsewhere": ("id,fixed,moving\n../x,a.nii.gz,b.nii.gz\n", {}, r"'../x' cannot be the name of a"),
    "volumes alone": ("image\na.nii.gz\n", {}, "lists volumes; a table of volumes .* needs either --to"),
    "pairs to a template": (
        "fixed,moving\na.nii.gz,b.nii.gz\n", {"all_pairs": True}, "lists pairs; .* of pairs .* neither",
    ),
    "one volume": ("image\na.nii.gz\n", {"all_pairs": True}, "lists one volume"),
    "no template": ("image\na.nii.gz\n", {"template": Path("none.nii")}, "there is no template none.nii"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tables(table: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pairs_of(table, text, **options)


# -- jobs and their records ---------------------------------------------------------------------------------------


def test_a_job_is_told_by_its_request(table: Path) -> None:
    (pair,) = pairs_of(table, "fixed,moving,initial\na.nii.gz,b.nii.gz,start.tfm\n")
    job = replace(pair.job, moving_spacing_mm=(1.0, 2.0, 3.0), frame="mean", seed=4)
    request = json.loads(json.dumps(job.request()))
    assert from_request(request) == job
    record = {"choices": {"request": request}, "versions": {"crossmorph": cluster.versions()["crossmorph"]}}
    assert same_work(job.request(), record)
    moved = table.parent / "moved.nii.gz"
    shutil.copy(job.fixed, moved)
    assert same_work(replace(job, fixed=moved).request(), record)  # the content counts, not the path
    assert not same_work(replace(job, seed=5).request(), record)
    assert not same_work(replace(job, settings=Mcbo(NONE, half_width=3)).request(), record)
    assert not same_work(replace(job, fixed=job.moving[0]).request(), record)
    assert not same_work(job.request(), {**record, "versions": {"crossmorph": "0.0.1"}})


@pytest.fixture
def cohort(table: Path, tmp_path: Path) -> Iterator[Path]:
    """The opened folder of a cohort."""
    with opened(tmp_path / "cohort") as out:
        yield out


def test_a_finished_pair_is_not_registered_again(
    table: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair,) = pairs_of(table, "id,fixed,moving\none,a.nii.gz,b.nii.gz\n")
    row = attempt(pair, cohort)
    assert (row["status"], row["fixed"], row["moving"]) == ("done", str(pair.job.fixed), str(pair.job.moving[0]))
    assert 1 < float(row["nmi_before"]) == pytest.approx(float(row["nmi_after"]), abs=0.01)
    folder = cohort / PAIRS / "one"
    with monkeypatch.context() as patch:
        patch.setattr(Job, "save", lambda *_, **__: pytest.fail("registered again"))
        assert attempt(pair, cohort) == row
    changed = Pair("one", replace(pair.job, seed=1))
    assert finished(changed, folder) is None
    assert attempt(changed, cohort)["status"] == "done"
    assert json.loads((folder / RECORD).read_text())["seed"] == 1
    (folder / "forward.h5").unlink()
    assert finished(changed, folder) is None


def test_what_goes_wrong_is_a_row_and_a_log(table: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = pairs_of(table, "id,fixed,moving\nbad,a.nii.gz,bad.nii.gz\ngood,a.nii.gz,b.nii.gz\n")
    row = attempt(bad, cohort)
    assert row["status"] == "failed"
    assert "bad.nii.gz cannot be read as an image" in str(row["message"])
    assert str(row["message"]) in (cohort / LOGS / "bad.log").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Job, "save", lambda *_, **__: 1 / 0)
        assert "a bug: ZeroDivisionError" in str(attempt(good, cohort)["message"])
    assert "Traceback" in (cohort / LOGS / "good.log").read_text()
    assert list((cohort / PAIRS).iterdir()) == []
    assert logging.getLogger("crossmorph").handlers == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond ``size`` bytes meanwhile, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_a_row_and_the_pair_is_made_up_for(table: Path, cohort: Path) -> None:
    (pair,) = pairs_of(table, "id,fixed,moving\none,a.nii.gz,b.nii.gz\n")
    with largest_file(4000):
        row = attempt(pair, cohort)
    assert row["status"] == "failed"
    assert "nothing half-written remains" in str(row["message"])
    assert list((cohort / PAIRS).iterdir()) == []
    assert attempt(pair, cohort)["status"] == "done"
    with largest_file(10), pytest.raises(InputError, match=r"cannot write .*cohort.csv"):
        write_table([row], cohort / "cohort.csv")


# -- tables and pages of results ----------------------------------------------------------------------------------


def test_rows_have_the_same_columns_and_the_page_puts_suspicious_ones_first(table: Path, tmp_path: Path) -> None:
    lines = "".join(f"p{n},a.nii.gz,b.nii.gz\n" for n in range(5))
    pairs = pairs_of(table, "id,fixed,moving\n" + lines)
    rows = [
        {**waiting_row(pairs[0]), "status": "done", "verdict": "ok", "confirmed": 0.9},
        {**waiting_row(pairs[1]), "status": "done", "verdict": "check", "confirmed": 0.5, "reasons": "<b>odd</b>"},
        {**waiting_row(pairs[2]), "status": "done", "verdict": "ok", "confirmed": 0.7},
        failed_row(pairs[3], "no\nimage"),
        {**waiting_row(pairs[4]), "status": "done", "verdict": "failed", "confirmed": 0.8},
    ]
    write_table(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as stream:
        back = list(csv.DictReader(stream))
    assert tuple(back[0]) == COLUMNS
    assert COLUMNS[-2:] == MEASURED
    assert [row["message"] for row in back] == ["", "", "", "no image", ""]
    assert [row["id"] for row in sorted(rows, key=suspicion)] == ["p3", "p4", "p1", "p2", "p0"]
    page = render(rows)
    places = [page.index(f'href="{target}"') for target in
              ("logs/p3.log", "pairs/p4/report.html", "pairs/p1/report.html", "pairs/p0/report.html")]  # fmt: skip
    assert places == sorted(places)
    assert "&lt;b&gt;odd" in page
    assert "2 ok, 1 check, 1 failed, 1 not registered" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_scores_that_are_not_known_are_empty(table: Path) -> None:
    (pair,) = pairs_of(table, "id,fixed,moving\none,a.nii.gz,b.nii.gz\n")
    spread = {"median": 1.0, "p95": 2.0, "max": 3.0}
    scores = {
        "nmi": {"b": {"before": None, "after": 1.2}}, "confirmed": {"b": 0.5}, "agreement": None, "overlap": 1.0,
        "folded": 0.0, "jacobian": [0.9, 1.1], "displacement_mm": spread, "moved_mm": spread,
        "inverse_residual_mm": spread,
    }  # fmt: skip
    stages = [{"stage": "a", "seconds": 1.0, "peak_mib": 5}, {"stage": "b", "seconds": 0.5, "peak_mib": 7}]
    row = done_row(pair, {"scores": scores, "verdict": {"status": "ok", "reasons": ["x", "y"]}, "stages": stages})
    assert "nmi_before" not in row
    assert "agreement" not in row
    assert (row["nmi_after"], row["jacobian_max"], row["moved_p95_mm"]) == (1.2, 1.1, 2.0)
    assert (row["reasons"], row["seconds"], row["peak_mib"]) == ("x; y", 1.5, 7)


# -- folders -----------------------------------------------------------------------------------------------------


def test_leftovers_go_and_foreign_folders_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out):
        (out / PAIRS / ".0a1b2c3d-one").mkdir()
        (out / PAIRS / "two").mkdir()
        with pytest.raises(InputError, match=r"another run is at work in .* \(process \d+ on "), opened(out):
            pass
    with opened(out):
        assert [path.name for path in (out / PAIRS).iterdir()] == ["two"]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="is not the folder of a cohort"), opened(tmp_path / "papers"):
        pass
    with pytest.raises(InputError, match="cannot write"), opened(tmp_path / "papers" / "thesis.tex" / "out"):
        pass


def test_a_folder_that_is_gone_is_not_made_again(table: Path, tmp_path: Path) -> None:
    (pair,) = pairs_of(table, "id,fixed,moving\none,a.nii.gz,b.nii.gz\n")
    row = attempt(pair, tmp_path / "unplugged")
    assert "is gone or was emptied; bring it back" in str(row["message"])
    assert not (tmp_path / "unplugged").exists()


# -- workers -----------------------------------------------------------------------------------------------------


def test_workers_get_the_planned_memory(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io.write(seen(Grid.from_spacing((100, 90, 80), 0.8)), table.parent / "large.nii")
    pairs = pairs_of(table, "fixed,moving\na.nii.gz,b.nii.gz\nlarge.nii,large.nii\n")
    both, small, large = (worker_bytes(some) for some in (pairs, pairs[:1], pairs[1:]))
    assert small > 0.4 * GIB
    assert large > 1.05 * small
    assert both == large
    monkeypatch.setattr(plan, "resident_bytes", lambda: 9.0 * GIB)  # of this process, which is none of the workers
    assert worker_bytes(pairs) == large
    told = [Pair("x", replace(pairs[0].job, settings=Mcbo(memory_gib=4)))]
    assert worker_bytes(told) == pytest.approx((4 * memory.ROOM + 0.15) * GIB, rel=1e-6)


def test_workers_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: range(8))
    two = int(2 * GIB)
    assert local_size(None, None, two, 0) == Size(5, 1, two)
    assert local_size(None, None, 0, 0) == Size(8, 1, 0)
    assert local_size(2, None, two, 0) == Size(2, 4, two)
    assert local_size(None, 3, two, 2) == Size(2, 3, two)
    with pytest.raises(InputError, match=r"6 workers need 2.00 GiB each, but 10.00 GiB are free .* --workers 5"):
        local_size(6, None, two, 0)
    with pytest.raises(InputError, match="3 workers need a GPU each, but there are 2"):
        local_size(3, None, two, 2)
    with pytest.raises(InputError, match="1 or more"):
        local_size(0, None, two, 0)


def test_every_local_worker_has_a_gpu_of_its_own() -> None:
    size = Size(2, 4, 10**9)
    options = worker_options(size, ["1"])
    assert options["env"] == {"CUDA_VISIBLE_DEVICES": "1"}
    assert (options["nthreads"], options["memory_limit"]) == (4, 10**9)
    assert worker_options(size, [])["env"] == {}


QUEUES = {
    "slurm": ("--partition=long --time=04:00:00", ["#SBATCH --partition=long --time=04:00:00",
              "#SBATCH --cpus-per-task=3", "#SBATCH --mem=2G"], "#SBATCH -t"),
    "pbs": ("-q long", ["#PBS -q long", "#PBS -l select=1:ncpus=3:mem=2048MB"], "walltime"),
    "sge": ("-q long.q -pe smp 3", ["#$ -q long.q -pe smp 3"], "h_rt"),
}  # fmt: skip


@pytest.mark.parametrize(("queue", "asked"), QUEUES.items(), ids=QUEUES)
def test_the_script_of_a_job(queue: cluster.Queue, asked: tuple[str, list[str], str]) -> None:
    options, lines, left_out = asked
    with queue_cluster(queue, options, Size(5, 3, 2 * 2**30)) as workers:
        script = workers.job_script()
    for line in lines:
        assert line in script.splitlines()
    assert left_out not in script
    assert "export MALLOC_TRIM_THRESHOLD_=67108864" in script.splitlines()
    assert "--nthreads 3 --memory-limit 2.00GiB" in script
    with pytest.raises(InputError, match="on one line"):
        queue_cluster(queue, "-q long\nrm", Size(1, 1, 2**30))


def test_workers_of_another_version_are_refused() -> None:
    mine = cluster.versions()

    def client(found: Any) -> Any:
        return SimpleNamespace(run=lambda *_, **__: {"tcp://one": mine, "tcp://two": found})

    assert check_workers(client(mine), ["tcp://one", "tcp://two"]) == ["tcp://one", "tcp://two"]
    assert check_workers(client(OSError("gone")), ["tcp://one", "tcp://two"]) == ["tcp://one"]
    with pytest.raises(InputError, match=r"tcp://two has crossmorph 0.0.1, but this is crossmorph .*; install"):
        check_workers(client({**mine, "crossmorph": "0.0.1"}), ["tcp://one", "tcp://two"])
    with pytest.raises(InputError, match="tcp://two cannot run crossmorph"):
        check_workers(client(ModuleNotFoundError("crossmorph")), ["tcp://one", "tcp://two"])


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SECONDS", 0.3)
    for address in ("tcp://127.0.0.1:1", "nonsense://"):
        with pytest.raises(InputError, match=f"no Dask scheduler answers at {address}"), connected(address):
            pass


def test_options_that_exclude_each_other(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text("fixed,moving\na.nii.gz,b.nii.gz\n")
    start = ["cohort", str(table), "-o", str(tmp_path / "out")]
    for more, message in (
        (["--scheduler", "tcp://x:1", "--slurm", ""], "give one of --scheduler"),
        (["--scheduler", "tcp://x:1", "--workers", "2"], "leave them out"),
        (["--slurm=-p long"], "say with --workers"),
    ):
        assert main([*start, *more]) == 2
        assert message in capsys.readouterr().err
