"""Landmarks and surfaces."""

import pytest
import torch

from crossmorph.errors import InputError
from crossmorph.points import Mesh, Points


def test_points_are_float64_rows_of_three() -> None:
    points = Points(torch.ones(2, 3, dtype=torch.float32), ("a", "b"), "fixed")
    assert points.xyz.dtype == torch.float64
    assert len(points) == 2
    moved = points.moved_to(points.xyz + 1, "moving")
    assert (moved.names, moved.space) == (("a", "b"), "moving")
    assert points.space == "fixed"
    with pytest.raises(InputError, match=r"\(N, 3\)"):
        Points(torch.ones(3))
    with pytest.raises(InputError, match="2 points but 1 names"):
        Points(torch.ones(2, 3), ("a",))


def test_mesh_faces_index_its_points() -> None:
    mesh = Mesh(Points(torch.eye(3), space="fixed"), torch.tensor([[0, 1, 2]]))
    assert mesh.space == "fixed"
    moved = mesh.moved_to(mesh.points.xyz * 2, "moving")
    assert moved.space == "moving"
    assert moved.faces is mesh.faces
    assert moved.points.xyz.sum() == 6
    with pytest.raises(InputError, match="does not have"):
        Mesh(Points(torch.eye(3)), torch.tensor([[0, 1, 3]]))
    with pytest.raises(InputError, match=r"\(F, 3\)"):
        Mesh(Points(torch.eye(3)), torch.tensor([0, 1, 2]))
    assert len(Mesh(Points(torch.eye(3)), torch.zeros(0, 3, dtype=torch.long)).faces) == 0
