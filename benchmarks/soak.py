"""Whether registrations of anything to anything end with a verdict, and whether memory stays flat.

python benchmarks/soak.py -o results/soak.csv

Pairs of real volumes, half of them drawn within one anatomy and half from all volumes, sensible or not, are
registered one after the other in one process. So that many pairs are affordable, the start is looked for at the
header and the centres and axes of the bodies only (``search = "local"``), and the deformable stage works on 4 mm.
A row is written when a pair is done; a process that was stopped goes on with the next pair.
"""

from __future__ import annotations

import csv
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from cases import data_folder
from peers import machine
from tables import Row, update_section
from tyro.conf import arg

HERE = Path(__file__).resolve().parent
COLUMNS = ("number", "fixed", "moving", "relation", "outcome", "reasons", "seconds", "rss_mib")
ENDINGS = (".nii.gz", ".mgz", ".mha")
NO_IMAGES = re.compile(r"label|_seg|gmseg|mask|lesion|DLMUSE|_gt")

BODIES = (
    (r"ixi_train/(IXI\d+)", "head"),
    (r"nichart/(Subj\d+)", "head"),
    (r"ms_mni/(p\d+)", "head"),
    (r"ms_longitudinal/(p\d+)", "head"),
    (r"brain_1mm/(subject_1|test_scan)", "head"),
    (r"ct_mr/(mni)_", "head"),
    (r"infant_t1t2/(month0)", "head"),
    (r"robustness/(orient|slab1|slab2|brain|asl|signed)", "head"),
    (r"ct_mr/(totalseg_ct|totalseg_mr)", "abdomen"),
    (r"microscopy/()", "mouse brain"),
    (r"spinal_cord/()", "spine"),
    (r"robustness/(thick17mm|infinite)", "spine"),
    (r"prostate/()", "prostate"),
    (r"robustness/(oblique)", "prostate"),
    (r"robustness/(shear)", "unknown"),
)
"""Pattern of a path, whose group tells one subject from another, and what the volume shows."""

RELATIONS = ("same subject", "same anatomy", "other anatomy")


@dataclass(frozen=True)
class Soak:
    """Register random pairs of real volumes."""

    output: Annotated[Path, arg(aliases=("-o",))]
    """CSV whose rows are kept."""

    pairs: int = 200
    """How many pairs."""

    seed: int = 0
    """Of the pairs."""

    update_readme: bool = False
    """Replace the section ``soak`` of benchmarks/README.md by what the CSV holds."""

    def run(self) -> None:
        """Register the pairs that the CSV lacks, then print the tables."""
        data = data_folder()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        done = {int(row["number"]) for row in read(self.output)}
        for number, (fixed, moving) in enumerate(drawn(volumes(data), self.pairs, self.seed)):
            if number not in done:
                row = {"number": number, "fixed": fixed, "moving": moving, "relation": relation(fixed, moving)}
                append(self.output, row | registered(data / fixed, data / moving))
        when = time.strftime("%Y-%m-%d")
        command = f"`python benchmarks/soak.py -o {self.output.name} --pairs {self.pairs} --seed {self.seed}`"
        text = f"{command}\n\n{when}; {machine()}; one thread.\n\n{report(read(self.output))}"
        print(text)
        if self.update_readme:
            update_section(HERE / "README.md", "soak", text)


def volumes(data: Path) -> list[str]:
    """Paths of all images below the folder, label maps and masks left out."""
    files = (path.relative_to(data).as_posix() for path in data.rglob("*") if path.name.endswith(ENDINGS))
    return sorted(file for file in files if not NO_IMAGES.search(file))


def body(file: str) -> tuple[str, str]:
    """Anatomy and subject."""
    for pattern, anatomy in BODIES:
        if found := re.match(pattern, file):
            return anatomy, f"{pattern} {found[1]}"
    raise SystemExit(f"{file}: no line of BODIES says what it shows")


def relation(fixed: str, moving: str) -> str:
    """One of ``RELATIONS``."""
    (anatomy, subject), (other_anatomy, other_subject) = body(fixed), body(moving)
    return RELATIONS[0 if subject == other_subject else 1 if anatomy == other_anatomy else 2]


def drawn(files: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Ordered pairs of two volumes: in turn of one anatomy, and any; every folder comes as often as any other."""
    random = np.random.default_rng(seed)
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(file.split("/")[0], []).append(file)

    def one() -> str:
        return str(random.choice(folders[str(random.choice(list(folders)))]))

    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        fixed, moving = one(), one()
        alike = body(fixed)[0] == body(moving)[0]
        if fixed != moving and (alike or len(pairs) % 2):
            pairs.append((fixed, moving))
    return pairs


def registered(fixed: Path, moving: Path) -> Row:
    """Verdict or message, seconds, and the process's memory afterwards."""
    from crossmorph import io, register
    from crossmorph.errors import InputError
    from crossmorph.settings import load_settings

    settings = load_settings()
    settings = replace(settings, spacing_mm=4.0, linear=replace(settings.linear, search="local"))
    start = time.perf_counter()
    try:
        verdict = register(io.read(fixed), io.read(moving), settings=settings).verdict
        outcome, reasons = verdict.status, "; ".join(verdict.reasons)
    except InputError as error:
        outcome, reasons = "refused", str(error)
    except Exception as error:  # what the soak looks for
        outcome, reasons = "crashed", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return {"outcome": outcome, "reasons": reasons, "seconds": f"{seconds:.1f}", "rss_mib": rss_mib()}


def rss_mib() -> int:
    """Memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss / 2**20)


def report(rows: Sequence[Row]) -> str:
    """Outcomes by relation, seconds, memory over time, and the senseless pairs that are ``ok``."""
    from crossmorph.evaluate.tables import markdown

    outcomes = ("ok", "check", "failed", "refused", "crashed")
    table: list[dict[str, Any]] = []
    for name in RELATIONS:
        counts = Counter(row["outcome"] for row in rows if row["relation"] == name)
        table.append({"pairs": name, "number": counts.total(), **{o: counts[o] for o in outcomes}})
    seconds = sorted(float(row["seconds"]) for row in rows)
    memory = [int(row["rss_mib"]) for row in rows]
    quarter = max(1, len(rows) // 4)
    last, second = np.mean(memory[-quarter:]), np.mean(memory[quarter : 2 * quarter])
    lines = [
        markdown(table),
        f"Seconds a pair: median {seconds[len(seconds) // 2]:.0f}, longest {seconds[-1]:.0f}. MiB of the process: "
        f"{memory[0]} after the first pair, on average {second:.0f} in the second quarter of the pairs and "
        f"{last:.0f} in the last, {max(memory)} at most.",
        "",
        "Other anatomy and yet ok:",
        "",
    ]
    wrong = [row for row in rows if row["relation"] == RELATIONS[2] and row["outcome"] == "ok"]
    lines += [f"- {row['fixed']} <- {row['moving']}: {row['reasons']}" for row in wrong] or ["- none"]
    return "\n".join(lines)


def read(file: Path) -> list[Row]:
    """Rows measured before."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(file: Path, row: Row) -> None:
    """Add one row, below a header line where the file is new."""
    new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    tyro.cli(Soak, description=__doc__).run()
