"""What on a slide is no stain: ink, coloured dirt. It is found once, on the overview, by its colour.

A stain's colours form one cloud: the share of red and green in the optical density hardly depends on how much
stain there is. Ink lies far outside of it. The cloud is fitted robustly to the slide itself, so stains other than H&E
have clouds of their own. What is found counts as not covered by the slide: it gives no detail, and no evidence.

Tears and folds have no colour of their own: `deepfere.model.damage` finds what may be one and
`deepfere.alignment.witness` asks the measurement; so with colours that are odd, but not odd enough to tell by
themselves, and with ink of the stain's own colour, which has no texture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter, label

from deepfere.model.features import StainReference, optical_density

ARTEFACTS = ("none", "ink", "tear", "fold", "piece")
"""Kinds of what is not used of a slide (piece: other pieces of tissue); their numbers stand in the stored map."""
FAR = 5.2
"""Distance from the cloud, in its standard deviations, from which a colour is no stain's.

After smoothing by a quarter of a measured pixel, four slides of three laboratories and generated ones stay below 4.0;
green, blue and black ink on the latter lie at 5.5 to 14.
"""
LEAST_OD = 0.2
"""Summed optical density below which a colour cannot be told."""
BLACK = 20
"""Grey level up to which a pixel shows nothing at all."""
SAMPLED_PX = 1_000_000
"""Pixels that the cloud is fitted to, about."""
KEPT = 0.9
"""Share of the tissue that the cloud is fitted to: up to a tenth of it may be ink."""


@dataclass(frozen=True)
class Artefacts:
    """Where a slide shows no stain, on the grid of its overview.

    Attributes:
        mask: (h, w) True where it does not.
        spacing_um: Pixel size (y, x), slide micrometres.
    """

    mask: NDArray[np.bool_]
    spacing_um: tuple[float, float]

    def at(self, origin_um: tuple[float, float], spacing_um: tuple[float, float], shape: tuple[int, int]) -> NDArray:
        """The mask (h, w) on another grid, by its pixel centres; beyond the overview nothing is masked.

        Args:
            origin_um: Outer corner of the first pixel (y, x).
            spacing_um: Pixel size (y, x).
            shape: Rows and columns.
        """
        out = np.zeros(shape, bool)
        index = [
            np.floor((origin_um[d] + (np.arange(shape[d]) + 0.5) * spacing_um[d]) / self.spacing_um[d]).astype(np.int64)
            for d in (0, 1)
        ]
        inside = [(i >= 0) & (i < n) for i, n in zip(index, self.mask.shape, strict=True)]
        if inside[0].any() and inside[1].any():
            out[np.ix_(*inside)] = self.mask[np.ix_(index[0][inside[0]], index[1][inside[1]])]
        return out


def find_artefacts(
    rgb: NDArray[np.uint8],
    coverage: NDArray[np.floating],
    reference: StainReference,
    spacing_um: tuple[float, float],
    pitch_um: float,
) -> Artefacts:
    """Ink and the like on a slide's overview, where its colour alone tells.

    Args:
        rgb: (h, w, 3) overview.
        coverage: (h, w) share of each pixel inside the slide.
        reference: The slide's stain constants.
        spacing_um: Overview pixel size (y, x).
        pitch_um: Measured pixel size: smaller marks do not matter.
    """
    marks = colour_distance(rgb, coverage, reference, spacing_um, pitch_um) > FAR
    if not marks.any():
        return Artefacts(marks, spacing_um)
    # Its blurred border belongs to it.
    reach = max(1, round(0.35 * pitch_um / min(spacing_um)))
    return Artefacts(binary_dilation(marks, np.ones((3, 3), bool), iterations=reach), spacing_um)


def colour_distance(
    rgb: NDArray[np.uint8],
    coverage: NDArray[np.floating],
    reference: StainReference,
    spacing_um: tuple[float, float],
    pitch_um: float,
) -> NDArray[np.float64]:
    """How far a slide's colours lie from its stain's (h, w), in standard deviations, smoothed; 0 = cannot be told.

    Args: those of `find_artefacts`.
    """
    density = optical_density(rgb, reference.white)
    total = density.sum(2)
    # A picture that was cut out may lie on black: that is its background, and no colour.
    black = rgb.max(2) <= BLACK
    pieces, _ = label(black)
    rim = np.unique(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]]))
    ground = binary_dilation(np.isin(pieces, rim[rim > 0]), np.ones((3, 3), bool), iterations=2)
    told = (total > LEAST_OD) & (total > 3 * reference.tissue_od) & (coverage > 0.99) & ~ground
    far = np.zeros(told.shape)
    if told.sum() < 200:
        return far
    share = density[told][:, :2] / total[told][:, None]
    sample = share[:: max(1, len(share) // SAMPLED_PX)].astype(np.float64)
    kept = sample
    for _ in range(4):
        mean, spread = kept.mean(0), np.cov(kept.T) + 1e-5 * np.eye(2)
        distance = np.einsum("ni,ij,nj->n", sample - mean, np.linalg.inv(spread), sample - mean)
        kept = sample[distance <= np.quantile(distance, KEPT)]
    # The trimmed cloud is too narrow: its widest tenth was left out.
    spread = 1.5 * np.cov(kept.T) + 1e-5 * np.eye(2)
    share -= kept.mean(0).astype(np.float32)
    far[told] = np.sqrt(((share @ np.linalg.inv(spread).astype(np.float32)) * share).sum(1))
    sigma = [0.25 * pitch_um / s for s in spacing_um]
    # Normalised: what lies beside a background is not diluted by it.
    weight = gaussian_filter((~ground).astype(np.float64), sigma)
    return np.where(ground, 0.0, gaussian_filter(far, sigma) / np.maximum(weight, 0.5))
