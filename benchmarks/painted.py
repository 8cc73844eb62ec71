"""Damage painted on a slide: ``python benchmarks/painted.py [CASE ...] [--quick] [--json FILE]``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, zoom


def smooth_path(rng, start, angle, length, bend, step):
    """Points (N, 2) along a line that turns at random."""
    n = max(2, int(length / step))
    turn = gaussian_filter(rng.normal(size=n), n / 6) 
    turn *= bend / (np.abs(turn).max() + 1e-9)
    heading = angle + turn
    moves = step * np.stack([np.sin(heading), np.cos(heading)], 1)
    path = np.cumsum(moves, 0)
    return start + path - path.mean(0)


def band(rng, shape, centre, angle, length, width, bend=0.5, ragged=0.3, soft=1.0, taper=False):
    """Alpha (h, w) of an irregular band, all in slide pixels."""
    path = smooth_path(rng, np.asarray(centre, float), angle, length, bend, 1.0)
    wide = gaussian_filter(rng.normal(size=len(path)), max(1, len(path) / 20))
    wide = width / 2 * np.clip(1 + ragged * wide / (wide.std() + 1e-9), 0.4, 1.8)
    if taper:
        wide = wide * np.linspace(0.15, 1.6, len(path))
    marked = np.full(shape, -1)
    at = np.clip(path.round().astype(int), 0, np.array(shape) - 1)
    marked[at[:, 0], at[:, 1]] = np.arange(len(path))
    distance, index = distance_transform_edt(marked < 0, return_indices=True)
    nearest = marked[index[0], index[1]]
    return np.clip((wide[nearest] - distance) / max(soft, 0.5) + 0.5, 0, 1)


def paint_tear(rgb, alpha, white, rng):
    a = alpha[..., None]
    glass = np.asarray(white) + rng.normal(0, 1.5, rgb.shape)
    return np.clip(rgb * (1 - a) + a * glass + 0.5, 0, 255).astype(np.uint8)


def paint_fold(rgb, alpha, white, factor):
    od = -np.log10((rgb.astype(np.float64) + 1) / (np.asarray(white) + 1))
    od = od * (1 + (factor - 1) * alpha[..., None])
    return np.clip((np.asarray(white) + 1) * 10**-od - 1 + 0.5, 0, 255).astype(np.uint8)
