"""A generated phantom: one trunk, seen by a CT and by an MR scanner, with a known deformation between."""

from crossmorph.phantom.anatomy import ORGANS
from crossmorph.phantom.pair import Motion, PhantomPair, make_pair

__all__ = ["ORGANS", "Motion", "PhantomPair", "make_pair"]
