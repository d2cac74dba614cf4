"""What docs/security.md promises: nothing in the package runs what a file holds, goes online, or tells names."""

import ast
import gzip
import io as bytes_io
import socket
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scene import GRID, QUICK, WARP, inverted, seen
from test_dicom import write

from crossmorph import io
from crossmorph.registration import register

SOURCES = sorted((Path(__file__).resolve().parent.parent / "src").rglob("*.py"))

MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "runpy"}
ONLINE = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "urllib3",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "telnetlib",
}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load"}
UNPACKING = {"extractall", "extract", "unpack_archive"}


def sins(source: str) -> Iterator[str]:
    """Everything in a module that could run, fetch or unpack what it should not, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            )
            yield from (f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in MODULES | ONLINE)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in CALLS or name.split(".")[-1] in UNPACKING or "shell" in options:
                yield f"{node.lineno}: {name}"
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                yield f"{node.lineno}: {name} without allow_pickle=False"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "import http.client",
        "eval('1')",
        "import torch\ntorch.load('a')",
        "subprocess.run('ls', shell=True)",
        "np.load('a.npz')",
        "np.load('a.npz', allow_pickle=True)",
        "zipfile.ZipFile('a').extractall('b')",
        "os.system('ls')",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert len(list(sins(source))) == 1


def test_no_module_runs_fetches_or_unpacks_what_files_hold() -> None:
    assert len(SOURCES) > 100
    found = {file.name: list(sins(file.read_text())) for file in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


# -- a whole run -------------------------------------------------------------------------------------------------

NAME = "Quimby^Zelda"
"""The patient."""


def nifti(path: Path) -> Path:
    """The moving image of the scene, with the patient in every text of its header."""
    image = seen(GRID, WARP, inverted)
    stored = nib.Nifti1Image(image.data[0].numpy(), GRID.affine)
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        stored.header[field] = NAME
    nib.save(stored, path)
    return path


def series(folder: Path) -> Path:
    """The fixed image of the scene as DICOM, with the patient's name and number."""
    folder.mkdir()
    values = np.rint(10 * seen(GRID).data[0].numpy()).astype(np.uint16)
    lps = np.diag([-1.0, -1, 1, 1]) @ GRID.affine
    for k in range(GRID.shape[2]):
        write(
            folder / f"{k:03}.dcm",
            k,
            PatientName=NAME,
            PatientID="QuimbyZelda77",
            ImageOrientationPatient=[-1, 0, 0, 0, -1, 0],
            ImagePositionPatient=(lps @ [0, 0, k, 1])[:3].tolist(),
            PixelSpacing=[2.0, 2.0],
            Rows=GRID.shape[1],
            Columns=GRID.shape[0],
            PixelData=values[:, :, k].T.tobytes(),
        )
    return folder


@pytest.mark.slow
def test_a_run_stays_offline_and_tells_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = io.read(series(tmp_path / "ct")), io.read(nifti(tmp_path / "mr.nii.gz"))
    for image in (fixed, moving):
        assert image.grid.shape == GRID.shape

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("went online")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    register(fixed, moving, settings=QUICK).save(tmp_path / "out")
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"record.json", "report.html"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        content += gzip.GzipFile(fileobj=bytes_io.BytesIO(content)).read() if path.suffix == ".gz" else b""
        for word in (b"Quimby", b"Zelda"):
            assert word not in content, f"{path.name} tells {word!r}"
