"""Files and folders appear complete or not at all."""

import errno
import os
from pathlib import Path

import pytest

from crossmorph.errors import InputError
from crossmorph.files import atomic_directory, atomic_path, check_output


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def half_write(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.nii.gz"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert temporary.name.endswith(".nii.gz")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(tmp_path) == ["a.nii.gz"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        half_write(temporary, ZeroDivisionError())
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputError, match=r"a\.txt: No space left"), atomic_path(tmp_path / "a.txt") as temporary:
        half_write(temporary, full)
    assert names(tmp_path) == []


def test_file_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"), atomic_path(tmp_path / "none" / "a.txt"):
        pass
    with pytest.raises(InputError, match="is a folder"), atomic_path(tmp_path):
        pass


def test_a_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as folder:
        (folder / "record.json").write_text("{}")
        assert not out.exists()
    assert names(out) == ["record.json"]
    assert names(out.parent) == ["out"]


def test_an_existing_folder_is_refused_then_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "record.json").write_text("1")
    (out / "stale").write_text("")
    with pytest.raises(InputError, match="--overwrite"), atomic_directory(out):
        pass
    with atomic_directory(out, overwrite=True) as folder:
        (folder / "record.json").write_text("2")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["record.json"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "record.json").write_text("1")
    with pytest.raises(KeyboardInterrupt), atomic_directory(out, overwrite=True) as folder:
        half_write(folder / "record.json", KeyboardInterrupt())
    assert names(tmp_path) == ["out"]
    assert (out / "record.json").read_text() == "1"


def test_overwrite_never_deletes_what_is_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"no record\.json"), atomic_directory(tmp_path, overwrite=True):
        pass
    file = tmp_path / "thesis.tex"
    with pytest.raises(InputError, match="not a folder"), atomic_directory(file, overwrite=True):
        pass
    assert file.read_text() == "years"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_parent_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not a folder you may write to"), atomic_directory(tmp_path / "out"):
        pass
    tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), atomic_directory(tmp_path / "file" / "out"):
        pass


def test_output_is_checked_before_the_work(tmp_path: Path) -> None:
    check_output(tmp_path / "deep" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        check_output(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path)
