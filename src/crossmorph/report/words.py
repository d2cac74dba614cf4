"""What a report says in words and tables. Names, paths and other free text of the inputs never enter it."""

from __future__ import annotations

from typing import Any, NamedTuple

from crossmorph.report.evidence import Evidence

MEANING = {
    "ok": "Nothing that was measured speaks against this registration.",
    "check": "Something is doubtful. Look at the pictures before you use this registration.",
    "failed": "Do not use this registration.",
}

SIGN = {"ok": "✓", "check": "?", "failed": "✗"}

WORST = 20
"""Landmarks that are listed one by one, the worst first."""


class Row(NamedTuple):
    """One measured thing: its name, its value, and what the value means."""

    name: str
    value: str
    meaning: str = ""


def moving_names(count: int) -> list[str]:
    """What the moving images are called on the page."""
    return ["moving image"] if count == 1 else [f"moving image {n + 1}" for n in range(count)]


def renamed(reason: str, record: dict[str, Any]) -> str:
    """A reason of the verdict with the page's names in place of the files'."""
    entries = record["inputs"]["moving"]
    for entry, name in zip(entries, moving_names(len(entries)), strict=True):
        if reason.startswith(f"{entry['name']}: "):
            return f"{name}: {reason.removeprefix(entry['name'] + ': ')}"
    return reason


def verdict(record: dict[str, Any]) -> dict[str, Any]:
    """Status, sign, meaning and reasons."""
    status = record["verdict"]["status"]
    reasons = [renamed(reason, record) for reason in record["verdict"]["reasons"]]
    return {"status": status, "sign": SIGN[status], "meaning": MEANING[status], "reasons": reasons}


def measurements(record: dict[str, Any]) -> list[Row]:
    """The scores of the record, a line each."""
    scores = record["scores"]
    rows = []
    names = moving_names(len(scores["nmi"]))
    for name, pair in zip(names, scores["nmi"].values(), strict=True):
        before, after = ("too little seen" if value is None else f"{value:.3f}" for value in pair.values())
        rows.append(Row(f"Similarity, {name}", f"{before} → {after}", "normalised mutual information, 1 to 2"))
    for name, share in zip(names, scores["confirmed"].values(), strict=True):
        rows.append(
            Row(f"Left in place, {name}", f"{100 * share:.0f} %", "of the body, by a new search both ways")
        )
    for name, ratio in zip(names, scores["mirrored_cost_ratio"].values(), strict=True):
        meaning = "times as different with left and right exchanged; below 1 would be suspicious"
        rows.append(Row(f"Mirrored, {name}", f"{ratio:.2f}", meaning))
    place = "  ".join(f"{axis} {x:.0f}" for axis, x in zip("RAS", scores["worst_place_mm"], strict=True))
    rows += [
        Row("Overlap", f"{100 * scores['overlap']:.0f} %", "of the fixed image that sees the moving one after"),
        Row("Moved", _spread(scores["moved_mm"]), "distance from where the start puts a voxel"),
        Row("Displacement", _spread(scores["displacement_mm"]), "the deformable part alone"),
        Row(
            "Volume change",
            " to ".join(f"{value:.2f}" for value in scores["jacobian"]),
            f"Jacobian determinant, above 1 larger in the moving image; smallest at {place} mm",
        ),
        Row("Folded", f"{100 * scores['folded']:.3f} %", "of the fixed voxels; no tissue folds"),
        Row("Inverse misses by", _spread(scores["inverse_residual_mm"]), "distance after there and back"),
    ]
    if scores["agreement"] is not None:
        share = f"{100 * scores['agreement']:.0f} %"
        rows.append(Row("Agreement at the start", share, "of the body where the search forth and back agrees"))
    return rows


def _spread(lengths: dict[str, float]) -> str:
    return f"{lengths['median']:.2f} mm, 95 % below {lengths['p95']:.2f}, at most {lengths['max']:.2f}"


def candidates(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The starts that were tried, the chosen one marked."""
    chosen = record["choices"].get("start", {}).get("from")
    best = max((entry["information"] for entry in record["choices"].get("starts", [])), default=None)
    return [
        {**entry, "chosen": entry["start"] == chosen and entry["information"] == best}
        for entry in record["choices"].get("starts", [])
    ]


def decisions(record: dict[str, Any]) -> list[str]:
    """What was kept and what was dropped, in the order of the run."""
    told = []
    for key in ("start", "rigid", "affine", "translation map", "similarity map", "deformable"):
        note = record["choices"].get(key)
        if note is None:
            continue
        what = "deformation" if key == "deformable" else key
        kept = "kept" if note["kept"] else "dropped"
        if "before" in note:
            told.append(f"{what}: {kept}; {note['judge']} {note['before']:.4f} → {note['after']:.4f}")
        else:
            told.append(f"{what}: {kept}; {note['why']}")
    for side, found in record.get("segmentations", {}).items():
        volumes = ", ".join(f"{label}: {mm3 / 1000:.1f} ml" for label, mm3 in found["volumes_mm3"].items())
        told.append(f"segmentation of the {side} image: {volumes or 'nothing was found'}")
    return told


def inputs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Geometry and fingerprint of each input."""
    entries = [record["inputs"]["fixed"], *record["inputs"]["moving"]]
    names = ["fixed image", *moving_names(len(entries) - 1)]
    overlaps = [None, *record["box_overlap"]]
    told = dict(zip((entry["name"] for entry in entries[1:]), names[1:], strict=True))
    for channel in record["inputs"].get("channels", ()):
        weight = f"weight {channel['weight']:g}"
        described = ", ".join(descriptor["name"] for descriptor in channel["describe"])
        partner = told[channel["moving"]]
        names.append(f"fixed image of {partner} ({weight}{', ' if described else ''}{described})")
        entries.append(channel["fixed"])
        overlaps.append(None)
    return [
        {
            "name": name,
            "shape": " x ".join(map(str, entry["shape"])),
            "spacing": " x ".join(f"{size:.3g}" for size in _spacing(entry["affine"])),
            "axes": entry["axes"],
            "seen": None if share is None else f"{100 * share:.0f} %",
            "sha256": (entry["sha256"] or "from memory")[:16],
            "notes": len(entry["notes"]),
        }
        for name, entry, share in zip(names, entries, overlaps, strict=True)
    ]


def _spacing(affine: list[list[float]]) -> list[float]:
    return [float(sum(row[axis] ** 2 for row in affine[:3]) ** 0.5) for axis in range(3)]


def stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds and memory of each stage, with the share of the longest for a bar."""
    longest = max((entry["seconds"] for entry in record["stages"]), default=0) or 1
    return [{**entry, "share": round(100 * entry["seconds"] / longest)} for entry in record["stages"]]


def landmarks(evidence: Evidence) -> dict[str, Any] | None:
    """Errors before and after, in mm; landmarks are told apart by their number in the file."""
    from crossmorph.evaluate.landmarks import summarise_errors, target_registration_error

    if evidence.points is None:
        return None
    fixed, moving = evidence.points
    before = target_registration_error(evidence.initial, fixed, moving)
    after = target_registration_error(evidence.transform, fixed, moving)
    summary = [
        {"name": name, **{key: summarise_errors(errors)[key] for key in ("mean", "median", "p95", "max")}}
        for name, errors in (("before", before), ("after", after))
    ]
    worst = sorted(range(len(after)), key=lambda n: -after[n])[:WORST]
    rows = [{"number": n + 1, "before": before[n], "after": after[n]} for n in worst]
    return {"count": len(after), "summary": summary, "rows": rows}


def fitted_landmarks(record: dict[str, Any]) -> dict[str, Any] | None:
    """Errors in mm of landmarks that took part in the fit, at its stages, and of those left out of it in turn."""
    note = record["choices"].get("landmarks")
    if note is None:
        return None
    left_out = record["choices"].get("landmarks left out", {})
    stages_ = {name: note[f"{name}_mm"] for name in ("before", "linear", "after")}
    rows = [{"number": n + 1, **dict(zip(stages_, errors, strict=True))}
            for n, errors in enumerate(zip(*stages_.values(), strict=True))]  # fmt: skip
    places = {name: n for n, name in enumerate(note["names"])}
    for name, error in left_out.items():
        rows[places[name]]["left_out"] = error
    held_out = record["choices"].get("landmarks held out")
    for row, error in zip(rows, held_out["errors_mm"] if held_out else (), strict=False):
        row["held_out"] = error
    folds = held_out["folds"] if held_out else 0
    return {"tolerance_mm": note["tolerance_mm"], "rows": rows, "some_left_out": bool(left_out), "folds": folds}


def overlaps(evidence: Evidence) -> list[dict[str, Any]] | None:
    """Dice of each label before and after, on the fixed grid of the labels."""
    from crossmorph.evaluate.overlap import label_overlap
    from crossmorph.resample import resample_labels

    if evidence.labels is None:
        return None
    fixed, moving = evidence.labels
    ids = tuple(sorted(set(fixed.ids) & set(moving.ids)))
    scores = []
    for pose in (evidence.initial, evidence.transform):
        warped = resample_labels(moving, fixed.grid, pose)
        scores.append(label_overlap(fixed, warped, moving, ids=ids))
    return [{"id": a.id, "before": a.dice, "after": b.dice} for a, b in zip(*scores, strict=True)]
