"""Whether what is shipped installs and works: python tests/installs.py [CASE ...]

A wheel is built from a source distribution, which is built from the files of the repository alone. It is installed
into an environment of the core dependencies, and into one for every extra, where everything must be importable
that needs no other extra. Such an environment is made in a second: it sees, by links in a folder of their own,
those packages of this Python's environment that the case asks for. Nothing but the wheel is ever installed there,
and without its dependencies: pip must not replace what the links lead to.

The case ``lowest`` is an environment of the oldest versions that pyproject.toml allows, of core and all extras, in
which a pair is registered too. It alone downloads packages. torch is this environment's: the oldest wheel for
Linux brings CUDA.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import tyro
from packaging.requirements import Requirement
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CASES = ("core", "report", "train", "dicom", "micro", "mesh", "tune", "cohort")
"""The dependencies without an extra, and with each extra alone."""

LOWEST = "lowest"
LINKED = "torch"

IMPORTS = """
import importlib, pkgutil, crossmorph
for module in pkgutil.walk_packages(crossmorph.__path__, "crossmorph."):
    if module.name == "crossmorph.__main__":  # runs
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(module.name, error.name)
"""


REGISTER = """
import crossmorph as cm
from crossmorph.phantom import make_pair
pair = make_pair()
result = cm.register(pair.fixed, pair.moving)
assert result.verdict.status != "failed", result.verdict
"""


@dataclass(frozen=True)
class Installs:
    """Build, install and import."""

    cases: Positional[tuple[str, ...]] = (*CASES, LOWEST)
    """Extras, each alone; core is none of them; lowest is all at their oldest."""

    def run(self) -> None:
        """Every case; the first that fails ends it."""
        with tempfile.TemporaryDirectory() as name:
            wheel = built(Path(name))
            for case in self.cases:
                python = oldest(Path(name) / case) if case == LOWEST else environment(Path(name) / case, case)
                pip(python, "install", "--no-deps", "--quiet", str(wheel))
                pip(python, "check")
                check_imports(python, case)
                if case == LOWEST:
                    call(str(python), "-c", REGISTER)
                check_commands(python, Path(name))
                print(f"{case}: installed, imported, run", flush=True)
                shutil.rmtree(python.parent.parent)


def built(folder: Path) -> Path:
    """The wheel, made from the source distribution of the files that git knows."""
    source = folder / "source"
    names = call("git", "-C", str(ROOT), "ls-files", "-z").split("\0")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source))
    shutil.rmtree(source)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert list((folder / "dist").glob("*.tar.gz")), "no source distribution"
    return wheel


def environment(folder: Path, case: str) -> Path:
    """A Python that sees what core and the case ask for, and nothing else."""
    return linked(folder, closure(asked("core", case)))


def oldest(folder: Path) -> Path:
    """A Python with the oldest versions of what is asked for anywhere."""
    pins = {need.name.lower(): lowest(need) for need in asked(*CASES) if need.name != LINKED}
    python = linked(folder, {name for name in closure([Requirement(LINKED)]) if name.lower() not in pins})
    pip(python, "install", "--quiet", *pins.values())
    return python


def lowest(need: Requirement) -> str:
    """The requirement, with the version that it starts from."""
    (bound,) = need.specifier
    extras = f"[{','.join(need.extras)}]" if need.extras else ""
    return f"{need.name}{extras}=={bound.version}"


def linked(folder: Path, names: Iterable[str]) -> Path:
    """A Python that sees these distributions of this environment, and nothing else."""
    call(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    site = Path(call(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    links = folder.with_name(f"{folder.name}-links")
    link(names, links)
    (site / "links.pth").write_text(f"{links}\n")
    return python


def asked(*cases: str) -> list[Requirement]:
    """What pyproject.toml asks for."""
    lines = {"core": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    found: list[Requirement] = []
    for need in (Requirement(line) for case in dict.fromkeys(cases) for line in lines[case]):
        found += asked(*need.extras) if need.name == PROJECT["name"] else [need]
    return found


def closure(needs: Iterable[Requirement]) -> set[str]:
    """Names of the distributions here that these ask for, directly or not."""
    found: set[str] = set()
    open_ends = [(need, extra) for need in needs for extra in ("", *need.extras)]
    seen: set[tuple[str, str]] = set()
    while open_ends:
        need, extra = open_ends.pop()
        if (need.name.lower(), extra) in seen:
            continue
        seen.add((need.name.lower(), extra))
        found.add(need.name)
        for line in distribution(need.name).requires or ():
            inner = Requirement(line)
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                open_ends += [(inner, name) for name in ("", *inner.extras)]
    return found


def link(names: Iterable[str], folder: Path) -> None:
    """Links to the packages of these distributions, outside of every environment."""
    folder.mkdir()
    for name in names:
        files = distribution(name).files or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            place = folder / top
            if not place.exists():
                place.symlink_to(distribution(name).locate_file(top))


def check_imports(python: Path, case: str) -> None:
    """Only modules that need another extra may fail, and by the name of one of its packages."""
    failed = dict(line.split() for line in call(str(python), "-c", IMPORTS).splitlines())
    mine, all_of_them = (
        {need.name.replace("-", "_") for need in asked(*cases)}
        for cases in (CASES if case == LOWEST else ("core", case), CASES)
    )
    wrong = {module: name for module, name in failed.items() if name.split(".")[0] not in all_of_them - mine}
    assert not wrong, f"{case}: {wrong} cannot be imported"


def check_commands(python: Path, folder: Path) -> None:
    """Help, and a command that reads and writes."""
    program = str(python.with_name("crossmorph"))
    assert "register" in call(program, "--help")
    (folder / "a.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: TranslationTransform_double_3_3\n"
        "Parameters: 1 2 3\nFixedParameters:\n"
    )
    call(program, "invert", str(folder / "a.tfm"), "-o", str(folder / "b.tfm"))
    assert "-1 -2 -3" in (folder / "b.tfm").read_text()
    (folder / "b.tfm").unlink()


def pip(python: Path, *arguments: str) -> None:
    """This environment's pip at work in another one."""
    call(sys.executable, "-m", "pip", "--python", str(python), *arguments)


def call(*command: str) -> str:
    """What a program prints; all of it where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    tyro.cli(Installs, description=__doc__).run()
