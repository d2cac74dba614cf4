"""A Learn2Reg run from images to the leaderboard row: a folder as LUMIR has it, made of brains of ixi_train.

python benchmarks/challenge.py -o results/challenge

As the organisers did, every brain is first brought onto one grid by an affine transform (crossmorph's own, onto
the first brain); then `crossmorph learn2reg` registers, writes the submission and scores it, as for the challenge.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro
from cases import data_folder
from tables import update_section
from tyro.conf import arg

SUBJECTS = ("IXI538-HH-2411", "IXI556-HH-2452", "IXI565-HH-2534", "IXI566-HH-2535")


@dataclass(frozen=True)
class Challenge:
    """Build the folder, run the challenge, print the leaderboard row."""

    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder for the images and the submission."""

    update_readme: str = ""
    """Section of benchmarks/README.md to replace."""

    def run(self) -> None:
        """Build, register, score and print."""
        task = self.output / "LUMIR"
        if not (task / "dataset.json").is_file():
            build(task)
        command = [sys.executable, "-m", "crossmorph", "learn2reg", str(task)]
        subprocess.run([*command, "-o", str(self.output / "run"), "--before"], check=True)
        text = (self.output / "run/leaderboard.md").read_text(encoding="utf-8")
        print(text)
        if self.update_readme:
            told = f"`python benchmarks/challenge.py -o results/challenge`, {time.strftime('%Y-%m-%d')}"
            update_section(Path(__file__).with_name("README.md"), self.update_readme, f"{told}\n\n{text}")


def build(task: Path) -> None:
    """Images and labels of all subjects on the first one's grid, under the names of the challenge."""
    import crossmorph as cm

    folder = data_folder() / "ixi_train"
    template = cm.read(folder / f"{SUBJECTS[0]}_T1.nii.gz")
    for name in ("imagesVal", "labelsVal"):
        (task / name).mkdir(parents=True, exist_ok=True)
    names = []
    for number, subject in enumerate(SUBJECTS, start=1):
        image = cm.read(folder / f"{subject}_T1.nii.gz")
        labels = cm.read_labels(folder / f"{subject}_T1_DLMUSE.nii.gz")
        if number > 1:
            affine = cm.register(template, image, deformable=False).transform
            image, labels = affine.apply(image, like=template), affine.apply(labels, like=template)
        names.append(f"LUMIRMRI_{number:04d}_0000.nii.gz")
        cm.write(image, task / "imagesVal" / names[-1])
        cm.write(labels, task / "labelsVal" / names[-1])
    pairs = [
        {"fixed": f"./imagesVal/{fixed}", "moving": f"./imagesVal/{moving}"} for fixed, moving in pairwise(names)
    ]
    (task / "dataset.json").write_text(
        json.dumps({"name": "LUMIR", "validation": pairs}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    tyro.cli(Challenge, description=__doc__).run()
