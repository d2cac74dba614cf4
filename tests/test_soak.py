"""The pairs of benchmarks/soak.py, and what it says of them."""

from pathlib import Path

import soak
import torch
from scene import GRID, inverted, seen

from crossmorph import io
from crossmorph.image import Image

FILES = [f"ixi_train/IXI{n:03}_T1.nii.gz" for n in range(6)] + ["ct_mr/mni_ct.nii.gz", "ct_mr/totalseg_ct.nii.gz"]


def test_relations_of_volumes() -> None:
    assert soak.relation("ms_mni/p07_T1.nii.gz", "ms_mni/p07_T2.nii.gz") == "same subject"
    assert soak.relation("ms_mni/p07_T1.nii.gz", "ixi_train/IXI012_T1.nii.gz") == "same anatomy"
    assert soak.relation("ct_mr/mni_ct.nii.gz", "ct_mr/totalseg_ct.nii.gz") == "other anatomy"
    assert soak.relation("prostate/adc.nii.gz", "prostate/t2_tra.nii.gz") == "same subject"


def test_pairs_are_the_same_every_time_and_half_of_one_anatomy() -> None:
    pairs = soak.drawn(FILES, 40, 3)
    assert pairs == soak.drawn(FILES, 40, 3) != soak.drawn(FILES, 40, 4)
    assert pairs[:10] == soak.drawn(FILES, 10, 3)
    assert all(fixed != moving for fixed, moving in pairs)
    assert all(soak.relation(*pair) != "other anatomy" for pair in pairs[::2])
    assert any(soak.relation(*pair) == "other anatomy" for pair in pairs)


def test_every_volume_of_the_data_is_known(data_dir: Path) -> None:
    files = soak.volumes(data_dir)
    assert len(files) > 100
    assert not [file for file in files if "label" in file or "_seg" in file]
    assert {soak.body(file)[0] for file in files} > {"head", "abdomen", "spine"}


def test_what_cannot_be_registered_is_a_row(tmp_path: Path) -> None:
    io.write(seen(GRID, None, inverted), tmp_path / "a.nii.gz")
    io.write(Image.from_array(torch.zeros(GRID.shape).numpy(), GRID), tmp_path / "empty.nii.gz")
    row = soak.registered(tmp_path / "a.nii.gz", tmp_path / "empty.nii.gz")
    assert row["outcome"] == "refused"
    assert "empty" in row["reasons"]
    assert row["rss_mib"] > 50


def test_the_report_counts_and_names_what_is_wrong(tmp_path: Path) -> None:
    base = {"fixed": "a", "moving": "b", "reasons": "why", "seconds": "2.0", "rss_mib": 500}
    rows = [
        ("same subject", "ok"),
        ("other anatomy", "ok"),
        ("other anatomy", "failed"),
        ("same anatomy", "check"),
    ]
    for number, (relation, outcome) in enumerate(rows):
        soak.append(tmp_path / "soak.csv", base | {"number": number, "relation": relation, "outcome": outcome})
    read = soak.read(tmp_path / "soak.csv")
    text = soak.report(read)
    assert "| other anatomy | 2 | 1 | 0 | 1 | 0 | 0 |" in text
    assert text.count("- a <- b: why") == 1
