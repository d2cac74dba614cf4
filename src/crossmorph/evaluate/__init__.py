"""Measure a registration: overlap, surfaces, landmarks, regularity, similarity; tables, statistics, Learn2Reg."""

from crossmorph.evaluate.case import Evaluation, evaluate, warp_labels
from crossmorph.evaluate.landmarks import label_centroid_error, summarise_errors, target_registration_error
from crossmorph.evaluate.overlap import LabelOverlap, label_overlap, mean_dice
from crossmorph.evaluate.regularity import (
    inverse_consistency,
    learn2reg_sdlogj,
    non_diffeomorphic_tetrahedra_percent,
    non_diffeomorphic_volume,
    voxel_determinant,
    voxel_displacement,
)
from crossmorph.evaluate.similarity import (
    lncc,
    lncc_map,
    mutual_information,
    ncc,
    normalised_mutual_information,
    ssim,
    ssim_map,
)
from crossmorph.evaluate.statistics import Comparison, cluster_bootstrap, compare, holm, ranking_table
from crossmorph.evaluate.surface import SurfaceDistances, label_surface_distances, surface_distances
from crossmorph.evaluate.tables import latex, markdown, summarise
from crossmorph.transform.jacobian import folding, jacobian_determinant, sdlogj

__all__ = [
    "Comparison",
    "Evaluation",
    "LabelOverlap",
    "SurfaceDistances",
    "cluster_bootstrap",
    "compare",
    "evaluate",
    "folding",
    "holm",
    "inverse_consistency",
    "jacobian_determinant",
    "label_centroid_error",
    "label_overlap",
    "label_surface_distances",
    "latex",
    "learn2reg_sdlogj",
    "lncc",
    "lncc_map",
    "markdown",
    "mean_dice",
    "mutual_information",
    "ncc",
    "non_diffeomorphic_tetrahedra_percent",
    "non_diffeomorphic_volume",
    "normalised_mutual_information",
    "ranking_table",
    "sdlogj",
    "ssim",
    "ssim_map",
    "summarise",
    "summarise_errors",
    "surface_distances",
    "target_registration_error",
    "voxel_determinant",
    "voxel_displacement",
    "warp_labels",
]
