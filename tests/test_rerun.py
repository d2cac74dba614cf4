"""A record makes its result again, to the last bit, or what differs is told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scene import QUICK, inverted, seen
from truth import volume

from crossmorph import io
from crossmorph.cli import main
from crossmorph.errors import InputError
from crossmorph.files import RECORD
from crossmorph.image import Labels
from crossmorph.job import Job
from crossmorph.points import Points
from crossmorph.record import content_hash
from crossmorph.registration import register
from crossmorph.rerun import compare, read_job
from crossmorph.result import values_hash
from crossmorph.space import Grid
from crossmorph.transform import Affine, Chain, DisplacementField

SMALL = Grid.from_spacing((20, 18, 16), 4.0)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a deformable registration with a mask, landmarks and a start."""
    folder = tmp_path_factory.mktemp("rerun")
    io.write(seen(SMALL), folder / "fixed.nii.gz")
    io.write(seen(SMALL, None, inverted), folder / "moving.nii.gz")
    mask = torch.ones(SMALL.shape, dtype=torch.int32)
    mask[:2] = 0
    io.write(Labels(mask, SMALL), folder / "mask.nii.gz")
    io.write_transform(Affine.translation((1, 0, 0)), folder / "start.tfm")
    for name in ("fixed", "moving"):
        io.write(Points(torch.tensor([[0.0, 0, 0], [10, 0, 5], [0, -9, 4], [5, 5, 5]])), folder / f"{name}.csv")
    job = Job(
        folder / "fixed.nii.gz",
        (folder / "moving.nii.gz",),
        QUICK,
        initial=folder / "start.tfm",
        fixed_mask=folder / "mask.nii.gz",
        landmarks=(folder / "fixed.csv", folder / "moving.csv"),
        landmark_tolerance_mm=3.0,
        device="cpu",
        seed=3,
    )
    job.save(folder / "out")
    return folder / "out"


def test_the_same_to_the_last_bit(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rerun", str(result / RECORD), "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told == (
        f"{tmp_path / 'out'}: the same to the last bit "
        "(confidence.nii.gz, forward.h5, inverse.h5, validity.nii.gz, warped.nii.gz)\n"
    )
    one, other = (json.loads((folder / RECORD).read_text()) for folder in (result, tmp_path / "out"))
    for record in (one, other):
        record.pop("stages")
    one["choices"].pop("memory"), other["choices"].pop("memory")  # how much the process had before
    assert one == other
    first, second = (io.read_transform(folder / "forward.h5") for folder in (result, tmp_path / "out"))
    places = torch.rand(50, 3, dtype=torch.float64) * 40 - 20
    assert torch.equal(first(places), second(places))


def test_what_differs_is_told(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The start is replaced by one that lies 3 mm further, and the record claims another machine."""
    record = json.loads((result / RECORD).read_text())
    io.write_transform(Affine.translation((4, 0, 0)), tmp_path / "start.tfm")
    record["choices"]["request"]["files"]["initial"][0]["file"] = str(tmp_path / "start.tfm")
    record["machine"]["processor"] = "abacus"
    (tmp_path / RECORD).write_text(json.dumps(record))
    assert main(["rerun", str(tmp_path / RECORD), "-o", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().out
    assert "differs in confidence.nii.gz, forward.h5" in told
    assert "initial: the file has other contents now" in told
    assert "processor: abacus then" in told
    assert "by how much cannot be told" in told
    after = json.loads((tmp_path / "out" / RECORD).read_text())
    found = compare(record, after, result / "forward.h5", tmp_path / "out" / "forward.h5")
    assert "mm apart on average" in found.effects[0]


def test_distances_are_those_of_the_transforms(result: Path, tmp_path: Path) -> None:
    record = json.loads((result / RECORD).read_text())
    for name, x in (("one", 1.0), ("two", 3.5)):
        io.write_transform(Affine.translation((x, 0, 0)), tmp_path / f"{name}.h5")
    other = {**record, "outputs": {**record["outputs"], "forward.h5": "0"}}
    found = compare(record, other, tmp_path / "one.h5", tmp_path / "two.h5")
    assert found.differ == ("forward.h5",)
    assert found.effects == ("the transforms are 2.5 mm apart on average, 2.5 mm at most",)
    assert found.causes == ()


def test_records_that_cannot_be_rerun(result: Path, tmp_path: Path) -> None:
    record = json.loads((result / RECORD).read_text())
    path = tmp_path / RECORD
    cases = (
        ("[]", "is not the record of a registration"),
        (json.dumps({**record, "choices": {}}), "does not tell what was asked for"),
        (json.dumps({**record, "choices": {"request": {}}}), "the request cannot be read: KeyError"),
    )
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_job(path)
    with pytest.raises(InputError, match="is not the record of a registration: FileNotFoundError"):
        read_job(tmp_path / "none.json")
    gone = json.loads(json.dumps(record))
    gone["choices"]["request"]["files"]["fixed"][0]["file"] = str(tmp_path / "gone.nii.gz")
    path.write_text(json.dumps(gone))
    assert main(["rerun", str(path), "-o", str(tmp_path / "out")]) == 2


def test_a_run_in_python_has_no_request() -> None:
    fixed = volume(SMALL)
    found = register(fixed, replace(fixed), settings=QUICK, deformable=False)
    assert "request" not in found.record["choices"]


def test_hashes_follow_contents(tmp_path: Path) -> None:
    field = DisplacementField(torch.rand(3, *SMALL.shape), SMALL)
    chain = Chain((field, Affine.translation((1, 2, 3))))
    assert values_hash(chain) == values_hash(Chain((replace(field), Affine.translation((1, 2, 3)))))
    assert values_hash(chain) != values_hash(Chain((field, Affine.translation((1, 2, 4)))))
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_text("one")
    before = content_hash(tmp_path / "series")
    (tmp_path / "series" / "1.dcm").write_text("two")
    changed = content_hash(tmp_path / "series")
    (tmp_path / "series" / "1.dcm").rename(tmp_path / "series" / "2.dcm")
    assert len({before, changed, content_hash(tmp_path / "series")}) == 3
