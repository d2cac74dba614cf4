"""The readers on damaged files: a few of what `make fuzz` tries, and all that it ever found (fuzz/corpus)."""

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutate import mutated
from targets import CORPUS, TARGETS, FindError, Target, attempt

from crossmorph import io
from crossmorph.errors import InputError
from crossmorph.io import itk_transforms

every = pytest.mark.parametrize("name", TARGETS)
IN_PROCESS = [name for name, target in TARGETS.items() if not target.starts]
FOUND = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.glob("*/*"))


@every
def test_the_seeds_are_read(tmp_path: Path, name: str) -> None:
    assert all(attempt(TARGETS[name], parts, tmp_path) for parts in TARGETS[name].seeds())


@pytest.mark.parametrize("name", IN_PROCESS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    @given(st.integers(0, 2**32))
    @settings(max_examples=25)
    def check(choice: int) -> None:
        random = Random(choice)
        attempt(target, mutated(random.choice(seeds), random), tmp_path)

    check()


@pytest.mark.parametrize("file", [file for file in FOUND if file != "h5/hang"])
def test_what_was_found(tmp_path: Path, file: str) -> None:
    attempt(TARGETS[file.split("/")[0]], (CORPUS / file).read_bytes(), tmp_path)


def test_a_transform_on_which_the_library_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(itk_transforms, "TRIAL_SECONDS", 1)
    (tmp_path / "a.h5").write_bytes((CORPUS / "h5" / "hang").read_bytes())
    with pytest.raises(InputError, match=r"a\.h5 cannot be read as a transform: the HDF5 library does not get"):
        io.read_transform(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("channels", "told"), [(2**20, "does not fit the network 'lumir'"), (2**62, "a network that cannot be")]
)
def test_settings_of_a_network_that_no_memory_holds(tmp_path: Path, channels: int, told: str) -> None:
    target = TARGETS["weights-json"]
    raw = target.seeds()[0].replace(b'"channels": 2', b'"channels": %d' % channels)
    for name, content in {target.file: raw, **target.beside(raw)}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told):
        target.read(tmp_path / target.file)


@pytest.mark.skipif(sys.platform != "linux", reason="limits processor seconds as Linux does")
def test_the_process_that_hangs_ends_by_itself() -> None:
    """Its parent may have been killed."""
    hang = str(CORPUS / "h5" / "hang")
    done = subprocess.run([sys.executable, "-P", "-c", itk_transforms.TRIAL, hang, "3"], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("nii/huge-extension", "its header announces an extension of 2137108966 bytes"),
        ("nrrd/cut-off-sizes", "its header says sizes: 3 21474836847 1e-320; they must be whole numbers"),
    ],
)
def test_what_would_take_all_memory(tmp_path: Path, file: str, told: str) -> None:
    path = tmp_path / f"a.{Path(file).parent}"
    path.write_bytes((CORPUS / file).read_bytes())
    with pytest.raises(InputError, match=told):
        io.read(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
points = st.fixed_dictionaries(
    {}, optional={"position": json_values, "label": json_values, "positionStatus": json_values}
)
markups = st.fixed_dictionaries(
    {"coordinateSystem": st.sampled_from(["LPS", "RAS", 0]) | json_values},
    optional={
        "controlPoints": st.lists(points | json_values, max_size=3) | json_values,
        "coordinateUnits": json_values,
    },
)


def test_markups_of_any_json(tmp_path: Path) -> None:
    @given(st.fixed_dictionaries({"markups": st.lists(markups, max_size=2) | json_values}) | json_values)
    @settings(max_examples=50)
    @example({"markups": [{"coordinateSystem": "LPS", "controlPoints": [{"position": [1, 2]}]}]})
    @example({"markups": [{"coordinateSystem": "LPS", "controlPoints": [{"position": [[1, 2, 3]]}]}]})
    def check(document: Any) -> None:
        attempt(TARGETS["mrk.json"], json.dumps(document).encode(), tmp_path)

    check()


entries = st.lists(
    json_values | st.dictionaries(st.sampled_from(["image", "label", "fixed", "moving", "0", "1"]), json_values)
)


def test_data_sets_of_any_json(tmp_path: Path) -> None:
    keys = st.sampled_from(["training", "test", "registration_val", "tensorImageShape", "name"])

    @given(st.dictionaries(keys, entries | json_values))
    @settings(max_examples=50)
    @example({"tensorImageShape": {"0": [3, None, 5]}})
    @example({"training": [{"image": "a", "label": 7}]})
    def check(document: Any) -> None:
        attempt(TARGETS["dataset.json"], json.dumps(document).encode(), tmp_path)

    check()


# -- headers of MetaImage, which ITK believes --------------------------------------------------------------------

HEAD = "NDims = 3\nElementSpacing = 1 1 1\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NDims = 3", "NDims = -3", "NDims = -3; it must be from 1 to 9"),
        ("NDims = 3", "NDims = 10", "NDims = 10; it must be from 1 to 9"),
        ("NDims = 3\n", "", "NDims = none"),
        ("DimSize = 2 2 2", "DimSize = 2 2", "DimSize = 2 2; it must be 3 whole numbers from 1"),
        ("DimSize = 2 2 2", "DimSize = 2 2 0", "DimSize = 2 2 0; it must be 3 whole numbers from 1"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 1 x", "ElementSpacing = 1 1 x; it must be 3 numbers"),
        ("NDims = 3", "NDims = 3\nNDims = 3", "the line 'NDims = 3', which is no field of its own"),
        ("NDims = 3", "hello\nNDims = 3", "the line 'hello', which is no field"),
        ("ElementDataFile = LOCAL\n", "", "does not end with a line ElementDataFile"),
    ],
)
def test_headers_that_itk_would_believe(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "a.mha"
    path.write_bytes(HEAD.encode() + bytes(range(8)))
    assert io.read(path).data.sum() == 28
    path.write_bytes(HEAD.replace(old, new).encode() + bytes(range(8)))
    with pytest.raises(InputError, match=message):
        io.read(path)


def test_headers_of_other_programs_pass(tmp_path: Path) -> None:
    """Fields that MetaImage does not know, values of any text, and more lines than a header has as a rule."""
    path = tmp_path / "a.mha"
    frames = "".join(f"Seq_Frame{n:04}_Probe.To-Tracker Transform = {'1 0 0 0 ' * 4}\n" for n in range(3000))
    head = HEAD.replace(
        "NDims = 3\n",
        f"ObjectType = Image\n0008|0020 = 2019-07-02\nComment = M\xfcller: 3 = drei\nNDims = 3\n{frames}",
    )
    path.write_bytes(head.encode("latin-1") + bytes(range(8)))
    assert io.read(path).data.sum() == 28


# -- the harness finds things ------------------------------------------------------------------------------------


class Trap:
    """Calls something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ()


def out_of_memory(path: Path) -> None:
    raise InputError("no") from MemoryError()


BAD: dict[str, Callable[[Path], Any]] = {
    "open": lambda path: path.with_name("b").write_text("x"),
    "pickle.find_class": lambda path: pickle.loads(pickle.dumps(Trap())),
    "subprocess.Popen": lambda path: subprocess.run([sys.executable, "-c", ""]),
    "memory ran out": out_of_memory,
}


@pytest.mark.parametrize("what", BAD)
def test_the_harness_sees(tmp_path: Path, what: str) -> None:
    with pytest.raises(FindError, match=what):
        attempt(Target("a", BAD[what], list), b"", tmp_path)
