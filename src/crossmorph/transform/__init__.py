"""Maps from the points of the fixed space to points of the moving space, in RAS mm."""

from crossmorph.transform.affine import Affine, AffineParts
from crossmorph.transform.base import Transform
from crossmorph.transform.chain import Chain, compose
from crossmorph.transform.field import DisplacementField
from crossmorph.transform.inverse import Inverse, covering_grid, invert_field
from crossmorph.transform.jacobian import displacement_determinant, folding, jacobian_determinant, sdlogj

__all__ = [
    "Affine",
    "AffineParts",
    "Chain",
    "DisplacementField",
    "Inverse",
    "Transform",
    "compose",
    "covering_grid",
    "displacement_determinant",
    "folding",
    "invert_field",
    "jacobian_determinant",
    "sdlogj",
]
