"""How smooth the stain features have to be, for every factor: what was learned at one scale has to hold at the next.

The fine scale has no training signal, so a relation must be extrapolated to it. Here that step is rehearsed one
octave up: weights are fitted between four and two measured pixels and have to predict what lies between two and
one, on blocks that they have not seen. Gaussian smoothing of the features takes away more of the finer octave
than of the coarser; the smoothing with which least is left unexplained there is extrapolated. (A held-out R2 at one
scale is blind to it: weights that are fitted to an octave make up for any smoothing in it.)

Every factor has a smoothing of its own. Where an ion is spread out in the tissue, or by the matrix, nuclei leave a
blur; at the tissue's edge another one falls as sharply as the stain does. One smoothing for both adds detail to the
one that it does not have, or takes the other's away. A factor takes another smoothing than what is best for all
together only where blocks of the section agree on it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepfere.cores import side_by_side
from deepfere.measured.operator import cell_means, fill_missing
from deepfere.model.ridge import FEATURE_SETS, RIDGES, detail_rows, target_rows

Array = NDArray[np.float64]
SMOOTHINGS_PITCH = (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Smoothings tried, in measured pixels. No less than 0.2: nothing here sees the alignment's error below that."""
DEFAULT_SMOOTHING_PITCH = 0.25
LEAST_PX = 200
"""Measured pixels below which two octaves cannot be told apart: then the default smoothing."""
LEAST_R2 = 0.05
"""Share of a factor's finer octave that must be explained before it has a smoothing of its own."""
OWN_ERRORS = 2.0
"""Standard errors by which a factor's best smoothing must be ahead of the common one. Where two factors cancel in an
ion, smoothings that differ by chance leave detail that nothing shows."""
MOST_SMOOTHINGS = 3
"""So many different ones for a section: each is computed for every pixel."""
OCTAVE = 2
FEATURE_BYTES = 64 * 2**20
"""Of the features of all smoothings that are looked at at a time; each takes several times as much."""


@dataclass(frozen=True)
class SmoothingChoice:
    """How smooth a section's stain features are.

    Attributes:
        smoothing_pitch: S.d. of the Gaussian in measured pixels for all factors together: the least that no other is
            ahead of.
        transferred_r2: R2 on the finer octave at that smoothing, NaN where it was not tried.
        gain: Least-squares factor on the predictions there, NaN where it was not tried.
        own_pitch: (K,) smoothing of every factor; empty where all take the common one.
    """

    smoothing_pitch: float
    transferred_r2: float
    gain: float
    own_pitch: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "own_pitch", tuple(self.own_pitch))  # of JSON it is a list

    @property
    def distinct(self) -> tuple[float, ...]:
        """Every smoothing that is used, the common one first."""
        return (self.smoothing_pitch, *sorted(set(self.own_pitch) - {self.smoothing_pitch}))

    def groups(self, count: int) -> NDArray[np.int64]:
        """Which of `distinct` each of so many factors takes, (K,)."""
        own = self.own_pitch or (self.smoothing_pitch,) * count
        return np.array([self.distinct.index(s) for s in own], np.int64)


def octave_rows(
    features: Array, images: Array, mask: NDArray[np.bool_], blocks: NDArray[np.int64], block: int
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Stain and measured detail between ``2 block`` and ``block`` measured pixels, with block numbers.

    Args:
        features: (F, ny, nx) footprint-averaged features, holes filled.
        images: (K, ny, nx) factors, holes filled.
        mask: (ny, nx) pixels that count.
        blocks: (ny, nx) spatial block numbers.
        block: 1 for the finest octave of the measurement, 2 for the one above.
    """
    stain, target, number = [], [], []
    for dy in range(block):
        for dx in range(block):
            ny, nx = ((n - d) // block * block for n, d in zip(mask.shape, (dy, dx), strict=True))
            if min(ny, nx) < 4 * block:
                continue
            crop = (slice(dy, dy + ny), slice(dx, dx + nx))
            whole = cell_means(mask[crop].astype(np.float64), block) > 0.999
            if not whole.any():
                continue
            coarse = fill_missing(cell_means(features[:, crop[0], crop[1]], block), whole)
            rows = detail_rows(coarse, whole, blocks[crop][::block, ::block], OCTAVE)
            small = fill_missing(cell_means(images[:, crop[0], crop[1]], block), whole)
            stain.append(rows.stain)
            target.append(target_rows(small, whole, OCTAVE))
            number.append(rows.block)
    if not stain:
        return np.zeros((0, len(features))), np.zeros((0, len(images))), np.zeros(0, np.int64)
    return np.concatenate(stain), np.concatenate(target), np.concatenate(number)


def transferred(
    coarse: tuple[Array, Array, NDArray[np.int64]], fine: tuple[Array, Array, NDArray[np.int64]], used: tuple[int, ...]
) -> Array:
    """Predictions (R, K) of the finer octave by ridge weights fitted on the coarser one, block by block left out.

    The penalty of every target is the one that is best on the coarser octave's own left-out blocks.

    Args:
        coarse: Stain detail, targets and blocks of the coarser octave.
        fine: Those of the finer one.
        used: Features that may have a weight.
    """
    columns = list(used)
    (x, y, block), (x_fine, y_fine, block_fine) = coarse, fine
    scale = np.sqrt((x[:, columns] ** 2).mean(0))
    scale = np.where(scale > 1e-9, scale, np.inf)
    x, x_fine = x[:, columns] / scale, x_fine[:, columns] / scale
    gram, cross = x.T @ x, x.T @ y
    left = []
    for name in np.unique(block_fine):
        out, out_fine = np.flatnonzero(block == name), np.flatnonzero(block_fine == name)
        left.append((out, out_fine, x[out], x_fine[out_fine], gram - x[out].T @ x[out], cross - x[out].T @ y[out]))
    eye, best, predicted = np.eye(x.shape[1]), np.full(y.shape[1], np.inf), np.zeros_like(y_fine)
    own, other = np.zeros_like(y), np.zeros_like(y_fine)
    for ridge in RIDGES:
        for out, out_fine, x_out, x_out_fine, lhs, rhs in left:
            beta = np.linalg.solve(lhs + ridge * len(x) * eye, rhs)
            own[out], other[out_fine] = x_out @ beta, x_out_fine @ beta
        error = ((y - own) ** 2).sum(0)
        better = error < best
        best = np.where(better, error, best)
        predicted[:, better] = other[:, better]
    return predicted


def moments(truth: Array, predicted: Array) -> Array:
    """What `gain_and_r2` needs of rows (R, K): (4, K) sums."""
    return np.stack(
        [(truth * predicted).sum(0), (predicted**2).sum(0), (truth**2).sum(0), ((truth - predicted) ** 2).sum(0)]
    )


def gain_and_r2(sums: Array) -> tuple[Array, Array]:
    """Least-squares gain (K,) of predictions, and their R2 (K,) as they are, of their `moments`."""
    product, power, total, left = sums
    return product / np.where(power > 0, power, np.inf), 1.0 - left / np.where(total > 0, total, np.inf)


def common_gain(sums: Array, weight: Array) -> tuple[float, float]:
    """Mean gain over the targets by what the stain says of them, and their mean R2.

    Args:
        sums: (4, K) `moments`.
        weight: (K,) importance of the targets.

    Returns:
        Gain, 0 where the stain says nothing; and R2: 1 less the share of the weighted variance that is left.
    """
    gains, explained = gain_and_r2(sums)
    power = weight * sums[2]
    r2 = float((explained * power).sum() / power.sum()) if power.sum() > 0 else 0.0
    # Targets that the stain says nothing about have a gain of noise.
    told = power * np.clip(explained, 0.0, None)
    return (float((gains * told).sum() / told.sum()) if told.sum() > 0 else 0.0), r2


def ahead(better: Array, worse: Array, errors: float = 1.0) -> NDArray[np.bool_]:
    """Whether something leaves less than another by more than so many standard errors of the difference.

    Args:
        better: (B, ...) what it leaves in each spatial block.
        worse: (B, ...) what the other one leaves.
        errors: How many.

    Returns:
        (...) False where fewer than two blocks can tell.
    """
    gained, count = worse - better, len(better)
    if count < 2:
        return np.zeros(gained.shape[1:], bool)
    error = np.sqrt(count / (count - 1) * ((gained - gained.mean(0)) ** 2).sum(0))
    return np.asarray(gained.sum(0) > errors * error)


def common_smoothing(left: Array) -> int:
    """The least smoothing that no other one is `ahead` of: what is smoothed away is lost for certain.

    Args:
        left: (S, B) what every smoothing leaves unexplained in each block; smoothings rise.

    Returns:
        Its number.
    """
    best = left[int(left.sum(1).argmin())]
    return next(s for s, one in enumerate(left) if not ahead(best, one))


def own_smoothings(left: Array, total: Array, common: int) -> NDArray[np.int64]:
    """Which smoothing each factor takes: the common one, or its best where that is `ahead` by `OWN_ERRORS`.

    They are `MOST_SMOOTHINGS` at most, those which together leave least; so its best of those that are as far ahead.

    Args:
        left: (S, B, K) what every smoothing leaves of the factors in each block.
        total: (K,) what there was.
        common: Number of the common smoothing.

    Returns:
        (K,) numbers of smoothings.
    """
    r2 = 1.0 - left.sum(1) / np.where(total > 0, total, np.inf)
    may = np.stack([ahead(one, left[common], OWN_ERRORS) for one in left]) & (r2 > LEAST_R2)
    may &= np.take_along_axis(may, r2.argmax(0)[None], 0)
    may[common] = True
    worth = np.where(may, r2, -np.inf)
    others = [s for s in range(len(r2)) if s != common]
    sets = [(common, *more) for n in range(MOST_SMOOTHINGS) for more in itertools.combinations(others, n)]
    # Of sets that leave as little the smallest: it comes first.
    kept = list(max(sets, key=lambda kept: float(worth[list(kept)].max(0).sum().round(9))))
    return np.array(kept)[worth[kept].argmax(0)]


def choose_smoothing(
    pooled: Array,
    smoothings: tuple[float, ...],
    mask: NDArray[np.bool_],
    blocks: NDArray[np.int64],
    images: Array,
    weight: Array,
) -> SmoothingChoice:
    """Smoothings of the features for one section.

    Args:
        pooled: (S, F, ny, nx) footprint-averaged features at every smoothing.
        smoothings: (S,) in measured pixels, rising. With one, it is taken as it is.
        mask: (ny, nx) measured pixels that the slide covers.
        blocks: (ny, nx) spatial block numbers.
        images: (K, ny, nx) factors, holes filled.
        weight: (K,) importance of the factors.
    """
    default = min(smoothings, key=lambda s: abs(s - DEFAULT_SMOOTHING_PITCH))
    fallback = SmoothingChoice(default, float("nan"), float("nan"))
    if mask.sum() < LEAST_PX:
        return fallback

    def tried(features: Array) -> Array | None:
        filled = fill_missing(features, mask)
        coarse, fine = (octave_rows(filled, images, mask, blocks, block) for block in (2, 1))
        if not len(coarse[0]) or not len(fine[0]):
            return None
        predicted = np.mean([transferred(coarse, fine, used) for used in FEATURE_SETS.values()], axis=0)
        truth, block = fine[1], fine[2]
        return np.stack([moments(truth[block == b], predicted[block == b]) for b in np.unique(block)])

    found = side_by_side(tried, pooled, at_once=max(1, FEATURE_BYTES // max(1, pooled[0].nbytes)))
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return fallback
    sums = np.stack(known)  # smoothings, blocks, moments, factors
    left, total = sums[:, :, 3], sums[0, :, 2].sum(0)
    common = common_smoothing(left @ weight)
    own = own_smoothings(left, total, common)
    gain, r2 = common_gain(sums[common].sum(0), weight)
    apart = tuple(smoothings[k] for k in own) if (own != common).any() else ()
    return SmoothingChoice(smoothings[common], r2, gain, apart)
