"""crossmorph aligns 3-D medical images of different modalities, and of the same one.

    import crossmorph as cm
    result = cm.register(cm.read("ct.nii.gz"), cm.read("mr.nii.gz"))
    result.save("out")

World coordinates are RAS+ millimetres; transforms map points of the fixed space to points of the moving space.
Names are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossmorph.channels import Channel as Channel
    from crossmorph.describe.mind import mind_ssc as mind_ssc
    from crossmorph.errors import InputError as InputError
    from crossmorph.image import Image as Image
    from crossmorph.image import Labels as Labels
    from crossmorph.io import read as read
    from crossmorph.io import read_labels as read_labels
    from crossmorph.io import read_mesh as read_mesh
    from crossmorph.io import read_points as read_points
    from crossmorph.io import read_transform as read_transform
    from crossmorph.io import write as write
    from crossmorph.points import Mesh as Mesh
    from crossmorph.points import Points as Points
    from crossmorph.registration import register as register
    from crossmorph.result import Result as Result
    from crossmorph.settings import Descriptor as Descriptor
    from crossmorph.settings import Mcbo as Mcbo
    from crossmorph.settings import Refinement as Refinement
    from crossmorph.settings import load_settings as load_settings
    from crossmorph.space import Grid as Grid
    from crossmorph.transform import Affine as Affine
    from crossmorph.transform import Chain as Chain
    from crossmorph.transform import DisplacementField as DisplacementField

_HOME = {
    "Affine": "transform",
    "Chain": "transform",
    "Channel": "channels",
    "Descriptor": "settings",
    "DisplacementField": "transform",
    "Grid": "space",
    "Image": "image",
    "InputError": "errors",
    "Labels": "image",
    "Mcbo": "settings",
    "Mesh": "points",
    "Points": "points",
    "Refinement": "settings",
    "Result": "result",
    "load_settings": "settings",
    "mind_ssc": "describe.mind",
    "read": "io",
    "read_labels": "io",
    "read_mesh": "io",
    "read_points": "io",
    "read_transform": "io",
    "register": "registration",
    "write": "io",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crossmorph' has no attribute {name!r}")
    value = getattr(import_module(f"crossmorph.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
