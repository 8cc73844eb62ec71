"""One rule that turns the images of any method into tissue classes, so that only the images differ.

The rule is learned from the **measurement** alone: a linear discriminant on a few noise-weighted principal images
of its ions, one for every spatial block, learned from the measured pixels outside the block and its neighbours, and
used on the high-resolution images inside it. No method's high-resolution image, and no label below the size of a
measured pixel, takes part in learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from deepfere.alignment.score import spatial_blocks
from deepfere.measured.factors import noise_sd
from deepfere.model.guide import Cells

Array = NDArray[np.float64]
Images = Callable[[Cells], Array]
"""A method: its ions (M, h f, w f) over a window of measured pixels."""

FACTORS = 16
"""Principal images that the discriminant sees, as many as the model's. The true images of a generated section got a
mean Dice of 0.945 with 8 of them and 0.996 with 16: with these, the rule is not what limits a score."""
SHRINK = 1e-2
"""Share of the mean variance that is added to every direction before the covariance is inverted."""
LEAST_PX = 8
"""Measured pixels of which a class must have the majority."""
BLOCKS_PER_SIDE = (4, 6, 8)
WINDOW_PX = 256


@dataclass(frozen=True)
class Rule:
    """Linear discriminants of one section.

    Attributes:
        mean: (M,) subtracted from the ions.
        projection: (K, M) ions to factors.
        weights: (B, C, K) of every block's discriminant.
        offsets: (B, C); minus infinity where a block's discriminant has not seen the class.
        codes: (C,) uint8 code of every class.
        blocks: (ny, nx) number of the block.
        unseen: Codes of classes that some block's discriminant has not seen enough of.
    """

    mean: Array
    projection: Array
    weights: Array
    offsets: Array
    codes: NDArray[np.uint8]
    blocks: NDArray[np.int64]
    unseen: list[int]

    def classes(self, images: Array, blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Codes (h, w) of ions (M, h, w), each pixel by the discriminant of its block (h, w)."""
        factors = np.tensordot(self.projection, images - self.mean[:, None, None], axes=1)
        out = np.zeros(blocks.shape, np.uint8)
        for block in np.unique(blocks):
            here = blocks == block
            scores = self.weights[block] @ factors[:, here] + self.offsets[block][:, None]
            out[here] = self.codes[scores.argmax(0)]
        return out


def signal_to_noise(cube: NDArray[np.floating], mask: NDArray[np.bool_]) -> tuple[Array, Array]:
    """How far each ion (M,) stands out of its noise (ratio of s.d.), and the noise s.d. used for weighting.

    Args:
        cube: (M, ny, nx), values outside the mask ignored.
        mask: (ny, nx) True where measured.
    """
    spread = np.asarray(cube[:, mask], np.float64).std(axis=1)
    # An ion without noise is not infinitely important.
    noise = np.maximum(noise_sd(cube, mask), 1e-3 * spread)
    return np.divide(spread, noise, out=np.zeros_like(spread), where=noise > 0), noise


def learn(cube: NDArray[np.floating], mask: NDArray[np.bool_], labels: NDArray[np.uint8]) -> Rule:
    """The rule of one section.

    Blocks are the largest (of 4 x 4, 6 x 6, 8 x 8 with equal numbers of labelled pixels) that leave `LEAST_PX`
    pixels of every class outside each of them; classes are equally likely beforehand, so that a border lies where
    two classes mix in equal parts.

    Args:
        cube: (M, ny, nx) measured ions, values outside the mask ignored.
        mask: (ny, nx) True where measured.
        labels: (ny, nx) code of the class that has the majority of each measured pixel, 0 = unlabelled.
    """
    table = np.asarray(cube[:, mask], np.float64).T
    mean = table.mean(0)
    noise = signal_to_noise(cube, mask)[1]
    weight = np.divide(1.0, noise, out=np.zeros_like(noise), where=noise > 0)
    weighted = (table - mean) * weight
    values, vectors = np.linalg.eigh(weighted.T @ weighted / len(table))
    kept = np.argsort(values)[::-1][: max(1, min(FACTORS, len(table) // 10))]
    kept = kept[values[kept] > 1e-9 * values.max()]
    projection = (vectors[:, kept] / np.sqrt(values[kept])).T * weight
    used = mask & (labels != 0)
    codes = np.unique(labels[used])
    factors = np.zeros((len(kept), *mask.shape))
    factors[:, mask] = projection @ (table - mean).T
    for per_side in BLOCKS_PER_SIDE:
        blocks = spatial_blocks(used, per_side)
        outside = [used & ~binary_dilation(blocks == b, np.ones((3, 3), bool)) for b in range(per_side**2)]
        counts = np.array([[(labels[o] == code).sum() for code in codes] for o in outside])
        if counts.min() >= LEAST_PX:
            break
    fits = [_discriminant(factors[:, o].T, labels[o], codes) for o in outside]
    unseen = [int(code) for code, least in zip(codes, counts.min(0), strict=True) if least < LEAST_PX]
    weights, offsets = (np.stack(part) for part in zip(*fits, strict=True))
    return Rule(mean, projection, weights, offsets, codes, blocks, unseen)


def _discriminant(points: Array, labels: NDArray[np.uint8], codes: NDArray[np.uint8]) -> tuple[Array, Array]:
    """Weights (C, K) and offsets (C,) of Fisher's linear discriminant with equal priors and a shrunk covariance.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2009, section 4.3.
    """
    members = [points[labels == code] for code in codes]
    size = points.shape[1]
    within = np.zeros((size, size))
    for part in members:
        if len(part):
            within += (part - part.mean(0)).T @ (part - part.mean(0))
    within /= max(sum(map(len, members)) - len(codes), 1)
    within += (SHRINK * np.trace(within) / size + 1e-9) * np.eye(size)
    centres = np.stack([part.mean(0) if len(part) else np.zeros(size) for part in members])
    weights = np.linalg.solve(within, centres.T).T
    offsets = -0.5 * (weights * centres).sum(1)
    offsets[[not len(part) for part in members]] = -np.inf
    return weights, offsets


def windows(shape_px: tuple[int, int], factor: int) -> Iterator[Cells]:
    """Windows of about `WINDOW_PX` high-resolution pixels a side that cover the grid."""
    side = max(1, WINDOW_PX // factor)
    ny, nx = shape_px
    for i in range(0, ny, side):
        for j in range(0, nx, side):
            yield Cells(i, min(i + side, ny), j, min(j + side, nx))


def segment(rule: Rule, images: Images, wanted: NDArray[np.bool_], factor: int) -> NDArray[np.uint8]:
    """Codes (ny f, nx f) of a method's images, window by window.

    Args:
        rule: From `learn`.
        images: The method.
        wanted: (ny, nx) measured pixels that matter; the others stay 0.
        factor: f.
    """
    ny, nx = wanted.shape
    out = np.zeros((ny * factor, nx * factor), np.uint8)
    for cells in windows((ny, nx), factor):
        here = (slice(cells.i0, cells.i1), slice(cells.j0, cells.j1))
        if not wanted[here].any():
            continue
        blocks = np.repeat(np.repeat(rule.blocks[here], factor, 0), factor, 1)
        fine = np.repeat(np.repeat(wanted[here], factor, 0), factor, 1)
        found = rule.classes(images(cells), blocks)
        rows, columns = (slice(s.start * factor, s.stop * factor) for s in here)
        out[rows, columns] = np.where(fine, found, 0)
    return out
