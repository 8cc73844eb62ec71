"""How well a segmentation agrees with given labels, above all where one tissue ends and the next begins.

Label images are (H, W) integers, 0 = unlabelled. A **border** is the set of midpoints between horizontal or
vertical neighbours of different labels, both labelled: the rim of the labelled region is none. Midpoints
belong to neither side, so a border that is shifted by n pixels is exactly n pixels away, and nothing depends on
orientation or numbering. Distances are found among the border's points alone: memory grows with the length of
the borders, not with the area.

A score that is undefined (a class or a border that neither image has) is NaN, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from deepfere.errors import InputError

Points = NDArray[np.float64]
SLACK_PX = 1e-9
"""Rounding of a distance that still counts as within a tolerance."""


@dataclass(frozen=True)
class Border:
    """Where labels change.

    Attributes:
        points: (N, 2) midpoints (row, column), pixels; a pixel's centre is at whole numbers.
        sides: (N, 2) labels of the two pixels.
    """

    points: Points
    sides: NDArray[np.integer]

    def of(self, label: int) -> Points:
        """Midpoints (n, 2) at which ``label`` ends."""
        return self.points[(self.sides == label).any(axis=1)]


def border(labels: ArrayLike) -> Border:
    """The border between the labelled pixels of an image.

    Args:
        labels: (H, W) integers, 0 = unlabelled.
    """
    image = np.asarray(labels)
    if image.ndim != 2:
        raise InputError(f"a label image has 2 axes, not {image.ndim}", remedy="pass one plane")
    points, sides = [], []
    for axis in (0, 1):
        moved = np.moveaxis(image, axis, 0)
        a, b = moved[:-1], moved[1:]
        rows, columns = np.nonzero((a != b) & (a != 0) & (b != 0))
        found = np.stack([rows + 0.5, columns], axis=1)
        points.append(found if axis == 0 else found[:, ::-1])
        sides.append(np.stack([a[rows, columns], b[rows, columns]], axis=1))
    return Border(np.concatenate(points).astype(np.float64), np.concatenate(sides))


def distances(points: Points, others: Points) -> NDArray[np.float64]:
    """Distance (N,) of every point to the nearest of ``others``; infinite where there are none."""
    if not len(others) or not len(points):
        return np.full(len(points), np.inf)
    # Points on a lattice have many equal coordinates, on which balancing the tree takes long and gains nothing.
    return np.asarray(cKDTree(others, balanced_tree=False, compact_nodes=False).query(points)[0], np.float64)


def boundary_f1(truth: Points, found: Points, tolerances_px: Sequence[float]) -> list[float]:
    """Boundary F1 of a found border at several tolerances, 0 to 1.

    Precision is the share of the found border within the tolerance of the true one, recall the share of the
    true border within the tolerance of the found one, F1 their harmonic mean. Source: Csurka, Larlus and
    Perronnin, What is a good evaluation measure for semantic segmentation?, BMVC 2013, section 3.

    Args:
        truth: (N, 2) points, pixels.
        found: (n, 2) points, pixels.
        tolerances_px: Largest distances that count as agreement, included.

    Returns:
        One score per tolerance; 0 where only one border exists, NaN where neither does.
    """
    if not len(truth) and not len(found):
        return [float("nan")] * len(tolerances_px)
    missed, off = distances(truth, found), distances(found, truth)
    out = []
    for tolerance in tolerances_px:
        recall = float((missed <= tolerance + SLACK_PX).mean()) if len(missed) else 0.0
        precision = float((off <= tolerance + SLACK_PX).mean()) if len(off) else 0.0
        both = recall + precision
        out.append(2.0 * recall * precision / both if both else 0.0)
    return out


def hausdorff95(truth: Points, found: Points) -> float:
    """The larger of the two directed 95th percentiles of the distance between two borders, pixels.

    The 95th percentile in place of the maximum: Huttenlocher, Klanderman and Rucklidge, IEEE Trans. Pattern Anal.
    Mach. Intell. 15, 1993, 850.

    Args:
        truth: (N, 2) points, pixels.
        found: (n, 2) points, pixels.

    Returns:
        Infinite where only one border exists, NaN where neither does.
    """
    if not len(truth) and not len(found):
        return float("nan")
    if not len(truth) or not len(found):
        return float("inf")
    return float(max(np.percentile(distances(a, b), 95) for a, b in ((truth, found), (found, truth))))


def dice(truth: ArrayLike, found: ArrayLike, label: int) -> float:
    """Dice overlap of one label, ``2 |A and B| / (|A| + |B|)`` over the pixels labelled in ``truth``, 0 to 1.

    Source: Dice, Ecology 26, 1945, 297.

    Args:
        truth: (H, W) integers, 0 = unlabelled.
        found: Same shape.
        label: The label.

    Returns:
        NaN where neither image has the label.
    """
    t, e = np.asarray(truth), np.asarray(found)
    if t.shape != e.shape:
        raise InputError(f"labels {t.shape} and segmentation {e.shape} differ in shape", remedy="use one grid")
    a, b = t == label, (e == label) & (t != 0)
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else float("nan")


@dataclass(frozen=True)
class Agreement:
    """How well one segmentation agrees with the labels.

    Attributes:
        f1: Mean boundary F1 per tolerance, over the classes that have a border in the truth.
        dice: Mean Dice over the classes.
        hausdorff95_px: Of all borders together, measured pixels.
        class_f1: Boundary F1 per class, then per tolerance.
        class_dice: Dice per class.
    """

    f1: list[float]
    dice: float
    hausdorff95_px: float
    class_f1: list[list[float]]
    class_dice: list[float]


def agreement(
    truth: ArrayLike, found: ArrayLike, classes: Sequence[int], factor: int, tolerances: Sequence[float] = (1.0, 2.0)
) -> Agreement:
    """Every score of one segmentation.

    Args:
        truth: (H, W) labels, 0 = unlabelled: nothing is scored there.
        found: (H, W) segmentation.
        classes: Labels that count.
        factor: Pixels of these images along one measured pixel.
        tolerances: Of the boundary F1, measured pixels.
    """
    t, e = np.asarray(truth), np.asarray(found)
    scores = [dice(t, e, label) for label in classes]
    true_border, found_border = border(t), border(np.where(t != 0, e, 0))
    limits = [tolerance * factor for tolerance in tolerances]
    f1 = [
        boundary_f1(edge, found_border.of(label), limits)
        if len(edge := true_border.of(label))
        else [float("nan")] * len(limits)
        for label in classes
    ]
    return Agreement(
        [_mean(column) for column in zip(*f1, strict=True)],
        _mean(scores),
        hausdorff95(true_border.points, found_border.points) / factor,
        f1,
        scores,
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
