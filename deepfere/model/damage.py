"""Where a slide's picture may show damage of handling: candidates for tears, folds and ink, by their look alone.

The look does not tell a tear from a lumen, a fold from a dense layer, nor blue ink from a blue layer. So these are
candidates, drawn generously; `deepfere.alignment.witness` lets the measurement decide about each.

* **Gap**: glass inside the tissue, that is in its holes or where a closing by four measured pixels reaches; and where
  the measurement shows tissue, as at an outline that something has broken off.
* **Band**: optical density well above that around, in the same hue (two layers of tissue absorb twice, in every
  colour alike), and longer than wide.
* **Odd colour**: far from the slide's other colours, but not so far that it can only be ink
  (`deepfere.model.artefacts`).
* **Flat**: without the texture that tissue has everywhere, as under ink of the stain's own colour.

What is too small to be a candidate goes with the damage beside it, once that is proven (`with_small`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepfere.model.artefacts import ARTEFACTS, colour_distance
from deepfere.model.features import StainReference, optical_density

CLOSING_PITCH = 4.0
"""Gaps that are open to the outside are found up to twice this width, in measured pixels."""
OUTLINE_PITCH = 1.0
"""How wide glass has to be where the measurement shows tissue, in measured pixels."""
LEAST_AREA_PITCH2 = 1.5
"""Smaller candidates, in squared measured pixels, cannot be judged; they are left in but beside damage."""
BESIDE_PITCH = 1.0
"""How near to proven damage of its kind what is small and no candidate by itself goes with it, in measured pixels."""
SMALL_PITCH2 = 3.0
"""Area of what is small, in squared measured pixels."""
DENSER = 1.3
"""Density of a band over that around: two layers have 2, less where one of them is thinner."""
LESS_DENSE = 1.15
"""The same beside such pixels."""
GROWTH_PITCH = 0.75
"""How far beside them, in measured pixels."""
HUE = 0.05
"""Largest change of red's and green's share in the density of a band."""
AROUND_PITCH = 3.0
"""Half-width of the surroundings that a band is compared with, in measured pixels."""
ELONGATED = 2.0
"""Length over width of a band, at least."""
COLOURED = 0.8
"""A slide whose glass is as coloured as that (weakest over strongest channel) shows none."""
ODD = 2.5
"""Distance from the stain's colours, in their standard deviations, from which ink is possible."""
FLAT = 0.25
"""Local s.d. of the density over its median in the tissue, below which a place is flat."""
FLAT_PITCH = 0.12
"""S.d. of the window of that local s.d., in measured pixels."""
FLAT_RIM_PITCH = 0.4
"""Beside a border nothing is flat: what is flat reaches so far beyond where it is seen to be, in measured pixels."""
RIM_PITCH = 0.25
"""What is blurred at the border of a gap or a band belongs to it: so far, in measured pixels."""
PART_PITCH = 2.0
"""Reach of the parts that a candidate is judged in, in measured pixels."""
FINER_PITCH = 1.0
"""The same for what lies beside a proven part of one."""
COARSEST_PITCH = 0.4
"""An overview with larger pixels (in measured pixels) shows too little."""


@dataclass(frozen=True)
class Candidates:
    """What may be damage, on the grid of the slide's overview.

    Attributes:
        labels: (h, w) int32, 0 = none, else the number of the part plus one.
        kinds: "tear", "fold" or "ink", one per part: what is large is judged in parts.
        whole: Number of the candidate that each part belongs to.
        denser: (h, w) how many times its surroundings' density a band has (median); 1 elsewhere.
        small: (h, w) uint8, kind (index into `ARTEFACTS`) of what has the look but is small and no candidate by itself.
    """

    labels: NDArray[np.int32]
    kinds: list[str]
    whole: list[int]
    denser: NDArray[np.float32]
    small: NDArray[np.uint8]


def find_candidates(
    planes: NDArray[np.uint8],
    reference: StainReference,
    spacing_um: tuple[float, float],
    pitch_um: float,
    expected: NDArray[np.bool_] | None = None,
) -> Candidates:
    """Gaps, bands, odd colours and flat places of a slide's overview.

    Args:
        planes: (7, h, w) base planes of the overview, what can only be ink not covered.
        reference: The slide's stain constants.
        spacing_um: Overview pixel size (y, x).
        pitch_um: Measured pixel size.
        expected: (h, w) where the measurement shows tissue.
    """
    labels = np.zeros(planes.shape[1:], np.int32)
    kinds: list[str] = []
    whole: list[int] = []
    denser = np.ones(planes.shape[1:], np.float32)
    small = np.zeros(planes.shape[1:], np.uint8)
    if max(spacing_um) > COARSEST_PITCH * pitch_um:
        return Candidates(labels, kinds, whole, denser, small)
    rgb, shown = np.moveaxis(planes[:3], 0, -1), planes[6] > 250
    step = (spacing_um[0] / pitch_um, spacing_um[1] / pitch_um)
    density = optical_density(rgb, _glass(reference))
    tissue = (density.mean(2) > _glass_od(density.mean(2)[shown], reference)) & shown
    ratio, hue = _against_surroundings(density, tissue, step)
    bands = _hysteresis((hue < HUE) & tissue, ratio, step)
    odd = colour_distance(rgb, planes[6] / 255, reference, spacing_um, pitch_um) > ODD
    ink = (odd | _flat(density.sum(2), tissue, step)) & tissue
    found: list[tuple[str, NDArray[Any], int, tuple[slice, ...]]] = []
    core = np.zeros(labels.shape, np.int32)
    for kind, mask in (("tear", _gaps(tissue, shown, step, expected)), ("ink", ink), ("fold", bands)):
        pieces, count = ndimage.label(mask, np.ones((3, 3), bool))
        area = np.bincount(pieces.ravel(), minlength=count + 1) * step[0] * step[1]
        small[(area[pieces] < LEAST_AREA_PITCH2) & (pieces > 0)] = ARTEFACTS.index(kind)
        for number, window in enumerate(ndimage.find_objects(pieces), 1):
            if window is None or area[number] < LEAST_AREA_PITCH2:
                continue
            piece = pieces[window] == number
            if kind == "fold" and _elongation(piece, step) < ELONGATED:
                if area[number] < SMALL_PITCH2:
                    small[window][piece] = ARTEFACTS.index(kind)
                continue
            found.append((kind, pieces, number, window))
            core[window][piece & (core[window] == 0)] = len(found)
    for order, (kind, pieces, number, window) in enumerate(found, 1):
        piece = pieces[window] == number
        if kind == "fold":
            denser[window][piece] = np.median(ratio[window][piece])
        wide, inner = _grown(window, piece, labels.shape, step)
        target = labels[wide]
        # A fold's end at a lumen is not of the lumen's rim.
        inner &= (target == 0) & shown[wide] & np.isin(core[wide], (0, order))
        parts = _parts(inner, step)
        target[inner] = len(kinds) + parts[inner]
        whole += [len(set(whole))] * int(parts.max())
        kinds += [kind] * int(parts.max())
    return Candidates(labels, kinds, whole, denser, small)


def with_small(
    proven: NDArray[np.int32], candidates: Candidates, spacing_um: tuple[float, float], pitch_um: float
) -> NDArray[np.int32]:
    """Parts that are proven damage, and what is small, has the look of one and lies beside it.

    A fold goes on behind a lumen, as a piece too small to judge or not longer than wide. Where nothing is proven,
    nothing is added.

    Args:
        proven: (h, w) the labels of what is proven, 0 elsewhere.
        candidates: What it was chosen from.
        spacing_um: Overview pixel size (y, x).
        pitch_um: Measured pixel size.

    Returns:
        (h, w) int32, the same labels; what is small has that of the nearest part of its kind.
    """
    step = (spacing_um[0] / pitch_um, spacing_um[1] / pitch_um)
    kinds = np.array([0, *[ARTEFACTS.index(kind) for kind in candidates.kinds]])[proven]
    out = proven.copy()
    for kind in np.unique(kinds[kinds > 0]):
        pieces, count = ndimage.label(candidates.small == kind, np.ones((3, 3), bool))
        distance, (y, x) = ndimage.distance_transform_edt(kinds != kind, sampling=step, return_indices=True)
        beside = np.zeros(count + 1, bool)
        beside[np.unique(pieces[distance <= BESIDE_PITCH])] = True
        beside[0] = False
        if beside.any():
            grown = ndimage.distance_transform_edt(~beside[pieces], sampling=step) <= RIM_PITCH
            added = grown & (out == 0)
            out[added] = proven[y[added], x[added]]
    return out


def finer(
    candidates: Candidates, divided: NDArray[np.bool_], spacing_um: tuple[float, float], pitch_um: float
) -> tuple[Candidates, NDArray[np.int64]]:
    """The candidates with some parts in smaller ones: a tear may run into a lumen.

    Args:
        candidates: As found.
        divided: (n,) which of their parts to divide.
        spacing_um: Overview pixel size (y, x).
        pitch_um: Measured pixel size.

    Returns:
        The candidates, and for each of their parts the number (from 0) of the one that it was or was part of.
    """
    step = (spacing_um[0] / pitch_um, spacing_um[1] / pitch_um)
    labels = np.zeros_like(candidates.labels)
    was: list[int] = []
    for number, window in enumerate(ndimage.find_objects(candidates.labels, len(divided))):
        if window is None:
            was.append(number)
            continue
        piece = candidates.labels[window] == number + 1
        parts = _parts(piece, step, FINER_PITCH) if divided[number] else piece.astype(np.int32)
        labels[window][piece] = len(was) + parts[piece]
        was += [number] * int(parts.max())
    kinds, whole = [candidates.kinds[n] for n in was], [candidates.whole[n] for n in was]
    return replace(candidates, labels=labels, kinds=kinds, whole=whole), np.array(was, np.int64)


def _parts(piece: NDArray[np.bool_], step: tuple[float, float], reach_pitch: float = PART_PITCH) -> NDArray[np.int32]:
    """A piece divided into parts 1, 2, ... (h, w) of such a reach, around points far from each other."""
    out = np.zeros(piece.shape, np.int32)
    at = np.argwhere(piece) * np.asarray(step)
    if len(at) == 0:
        return out
    nearest, owner = np.full(len(at), np.inf), np.zeros(len(at), np.int32)
    centre, count = int(((at - at.mean(0)) ** 2).sum(1).argmax()), 0
    while nearest[centre] > reach_pitch:
        count += 1
        distance = np.linalg.norm(at - at[centre], axis=1)
        owner[distance < nearest] = count
        nearest = np.minimum(nearest, distance)
        centre = int(nearest.argmax())
    out[piece] = owner
    return out


def _glass(reference: StainReference) -> tuple[float, float, float]:
    """RGB of the slide's glass; of a picture without any, whose lightest colour is a stain's, colourless."""
    white = reference.white
    return white if min(white) >= COLOURED * max(white) else (max(white),) * 3


def _glass_od(density: NDArray[np.float32], reference: StainReference) -> float:
    """Mean optical density up to which a pixel is glass, from those of the overview (N,).

    The lower of two thresholds that make three classes (Otsu, IEEE Trans. SMC 9, 62, 1979): on a strongly stained slide
    one threshold would take its pale tissue for glass. Like the tissue's own it is taken with 0.6.
    """
    if len(density) == 0:
        return reference.tissue_od
    counts, edges = np.histogram(density[density < 1.5], bins=128)
    mass = np.cumsum(counts)
    first = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    i, j = np.triu_indices(len(counts) - 1, 1)
    parts = ((mass[i], first[i]), (mass[j] - mass[i], first[j] - first[i]), (mass[-1] - mass[j], first[-1] - first[j]))
    between = sum(f**2 / np.maximum(m, 1) for m, f in parts)
    return min(reference.tissue_od, 0.6 * float(edges[1 + i[int(np.argmax(between))]]))


def _gaps(
    tissue: NDArray[np.bool_],
    shown: NDArray[np.bool_],
    step: tuple[float, float],
    expected: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Glass (h, w) in holes of the tissue, within its closing, or where tissue is expected.

    Args:
        tissue: (h, w).
        shown: (h, w) what the slide covers.
        step: Overview pixel in measured pixels.
        expected: (h, w) where the measurement shows tissue.
    """
    far = ndimage.distance_transform_edt(~tissue, sampling=step)
    wide = far <= CLOSING_PITCH
    closed = ndimage.distance_transform_edt(np.pad(wide, 1, constant_values=True), sampling=step)[1:-1, 1:-1]
    # Specks of dust are no tissue: what is closed around them is no gap in it.
    inside = (closed > CLOSING_PITCH) | ndimage.binary_fill_holes(tissue)
    glass = ~tissue & shown
    if expected is None:
        return inside & glass
    # An outline is known to a measured pixel: what is thinner than that beside it has not broken off.
    missing = glass & expected
    core = ndimage.distance_transform_edt(missing, sampling=step) > OUTLINE_PITCH / 2
    if core.any():
        inside |= ndimage.distance_transform_edt(~core, sampling=step) <= OUTLINE_PITCH / 2
    return inside & glass


def _flat(density: NDArray[np.float32], tissue: NDArray[np.bool_], step: tuple[float, float]) -> NDArray[np.bool_]:
    """Where the density (h, w) of the tissue hardly changes from pixel to pixel."""
    sigma = [FLAT_PITCH / s for s in step]
    weight = np.maximum(ndimage.gaussian_filter(tissue.astype(np.float32), sigma), 1e-3)
    mean, square = (ndimage.gaussian_filter(d * tissue, sigma) / weight for d in (density, density**2))
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    flat = tissue & (spread < FLAT * np.median(spread[tissue])) if tissue.any() else tissue
    if not flat.any():
        return flat
    return np.asarray(ndimage.distance_transform_edt(~flat, sampling=step) <= FLAT_RIM_PITCH, bool)


def _hysteresis(allowed: NDArray[np.bool_], ratio: NDArray[np.float32], step: tuple[float, float]) -> NDArray[np.bool_]:
    """Where the ratio (h, w) exceeds `DENSER`, and around that where it exceeds `LESS_DENSE`."""
    clear = allowed & (ratio > DENSER)
    if not clear.any():
        return clear
    close = ndimage.distance_transform_edt(~clear, sampling=step) <= GROWTH_PITCH
    return clear | (allowed & (ratio > LESS_DENSE) & close)


def _against_surroundings(
    density: NDArray[np.float32], tissue: NDArray[np.bool_], step: tuple[float, float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Density (h, w, 3), summed, over that of the surroundings, and the largest change of a colour's share: (h, w)."""
    sigma = [0.15 / s for s in step]
    weight = ndimage.gaussian_filter(tissue.astype(np.float32), sigma)
    smooth = np.stack([ndimage.gaussian_filter(density[..., c] * tissue, sigma) for c in range(3)])
    smooth /= np.maximum(weight, 1e-3)
    around = _surroundings(smooth, tissue, step)
    total, ground = (np.maximum(image.sum(0), 1e-3) for image in (smooth, around))
    return total / ground, np.abs(smooth[:2] / total - around[:2] / ground).max(0)


def _surroundings(
    density: NDArray[np.float32], tissue: NDArray[np.bool_], step: tuple[float, float]
) -> NDArray[np.float32]:
    """Median density (3, h, w) of the tissue within `AROUND_PITCH`, computed on blocks of half a measured pixel."""
    block = [max(1, round(0.5 / s)) for s in step]
    h, w = tissue.shape
    ny, nx = -(-h // block[0]), -(-w // block[1])
    pad = ((0, ny * block[0] - h), (0, nx * block[1] - w))

    def means(image: NDArray) -> NDArray:
        return np.pad(image, pad).reshape(ny, block[0], nx, block[1]).mean((1, 3))

    share = means(tissue.astype(np.float32))
    coarse = np.stack([means(d * tissue) for d in density]) / np.maximum(share, 1e-3)
    coarse[:, share < 0.3] = np.nan
    reach = [max(1, round(AROUND_PITCH / (s * b))) for s, b in zip(step, block, strict=True)]
    padded = np.pad(coarse, ((0, 0), (reach[0],) * 2, (reach[1],) * 2), constant_values=np.nan)
    out = np.zeros_like(coarse)
    size = (2 * reach[0] + 1, 2 * reach[1] + 1)
    for i in range(ny):
        rows = np.lib.stride_tricks.sliding_window_view(padded[:, i : i + size[0]], size, (1, 2))[:, 0]
        flat = np.sort(rows.reshape(3, nx, -1), axis=-1)  # NaN last
        count = np.isfinite(flat[0]).sum(-1)
        middle = np.maximum(count - 1, 0) // 2
        out[:, i] = np.where(count > 0, np.take_along_axis(flat, middle[None, :, None], -1)[..., 0], 0)
    zoomed = np.repeat(np.repeat(out, block[0], 1), block[1], 2)
    return zoomed[:, :h, :w].astype(np.float32)


def _elongation(piece: NDArray[np.bool_], step: tuple[float, float]) -> float:
    """Length over width of a piece: its area over its squared width, the width by the deepest points."""
    depth = ndimage.distance_transform_edt(np.pad(piece, 1), sampling=step)[1:-1, 1:-1]
    width = 2 * float(np.quantile(depth[piece], 0.95))
    return float(piece.sum()) * step[0] * step[1] / width**2


def _grown(
    window: tuple[slice, ...], piece: NDArray[np.bool_], shape: tuple[int, ...], step: tuple[float, float]
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """A piece with its rim: the larger window and the mask in it."""
    reach = [int(np.ceil(RIM_PITCH / s)) for s in step]
    wide = [slice(max(0, s.start - r), min(n, s.stop + r)) for s, r, n in zip(window, reach, shape, strict=True)]
    mask = np.zeros([s.stop - s.start for s in wide], bool)
    first = [s.start - w.start for s, w in zip(window, wide, strict=True)]
    mask[first[0] : first[0] + piece.shape[0], first[1] : first[1] + piece.shape[1]] = piece
    return (wide[0], wide[1]), ndimage.distance_transform_edt(~mask, sampling=step) <= RIM_PITCH
