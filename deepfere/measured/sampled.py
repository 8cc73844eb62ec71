"""What a sample of one section's spectra shows, small enough to be kept for every section of a study.

Centroids: how many, how intense on average and at most, and where, in bins of a logarithmic m/z axis that is the same
for all files. Profiles: their mean spectrum on their own points, and how high they reach there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.measured.tolerance import Tolerance
from deepfere.measured.windows import gaps

Spectra = Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]
BINS_PER_TOLERANCE = 6
MOST_FEW = 0.1
LEAST_STEP = 3.5e-7
"""Of the logarithm of m/z: the range of an instrument stays within a few ten million bins."""
LEAST_STEP_MZ = 1000.0
"""Where it is that step, if windows have an absolute part."""


@dataclass(frozen=True)
class PeakSpec:
    """How ions are found.

    Attributes:
        tolerance_ppm: Half-width of an ion's window...
        tolerance_da: ...and what is added to it.
        min_fraction: An ion is in at least this fraction of the sampled spectra...
        strong_fraction: ...or its mean intensity is at least this fraction of the strongest ion's (profiles:
            always required)...
        bright_fraction: ...or its greatest intensity is at least this fraction of the brightest ion's (profiles: what
            is not in the mean).
        min_spectra: And in at least so many of them in any case.
        false_ions: Centroids: ions that chance alone may add over the whole range (Poisson, at the rate of
            centroids in each ion's surroundings); as many again where several sections are looked at one by one.
        snr: Intensity over that of the surroundings, in units of its noise; of profiles, prominence of a maximum.
        sample: Spectra of a section that are looked at, at most.
        mz_range: Lowest and highest m/z of an ion; None takes the whole range.
        structure: Whether ions without spatial structure are left out.
    """

    tolerance_ppm: float = 5.0
    min_fraction: float = 0.01
    strong_fraction: float = 1e-3
    bright_fraction: float = 0.05
    min_spectra: int = 3
    false_ions: float = 0.05
    snr: float = 5.0
    sample: int = 2000
    mz_range: tuple[float, float] | None = None
    tolerance_da: float = 0.0
    structure: bool = True

    @property
    def tolerance(self) -> Tolerance:
        """Half-width of an ion's window."""
        return Tolerance(self.tolerance_ppm, self.tolerance_da)

    @property
    def offset_da(self) -> float:
        """What is added to m/z so that windows are as wide everywhere on a logarithmic axis."""
        return self.tolerance_da / (self.tolerance_ppm * 1e-6)

    @property
    def step(self) -> float:
        """Width of a bin on the axis of `place`."""
        least = LEAST_STEP * (LEAST_STEP_MZ / (LEAST_STEP_MZ + self.offset_da))
        return max(self.tolerance_ppm * 1e-6 / BINS_PER_TOLERANCE, least)

    def place(self, mz: NDArray[np.float64]) -> NDArray[np.float64]:
        """m/z on an axis on which all windows are equally wide: logarithmic, and linear where they are all of the Da.

        d(log(m/z + offset)) = d(m/z) / (m/z + offset), and the half-width of a window is ppm 1e-6 (m/z + offset).
        """
        return np.log(mz) if self.offset_da == 0 else np.log1p(mz / self.offset_da)

    @property
    def half_bins(self) -> int:
        """Bins to either side of an ion that are its window."""
        return max(1, round(self.tolerance_ppm * 1e-6 / self.step))

    def few(self, count: int) -> bool:
        """Whether as many spectra as an ion has to be in are few of some."""
        return self.min_spectra <= MOST_FEW * count

    def to_dict(self, kind: str) -> dict[str, Any]:
        """What mattered for this kind of spectra, "centroid" or "profile", as the store states it."""
        unused = set() if kind == "centroid" else {"min_fraction", "false_ions"}
        if not self.tolerance_da:
            unused.add("tolerance_da")
        return {name: value for name, value in asdict(self).items() if name not in unused}


def sample_rows(n: int, spec: PeakSpec) -> NDArray[np.int64]:
    """Evenly spaced spectra, (<= spec.sample,) int64."""
    count = min(n, spec.sample)
    return np.unique((np.arange(count) + 0.5) * n / count).astype(np.int64)


class Bins:
    """Counts on the logarithmic axis, where something was counted; bin k holds ``k step <= place(m/z) < (k+1) step``.

    Attributes:
        first: Number of the first bin that is held.
        hits: (B,) spectra with a centroid in the bin.
        total: (B,) sum of the intensities.
        moment: (B,) sum of intensity times m/z.
        high: (B,) the greatest intensity.
    """

    def __init__(self) -> None:
        self.first = 0
        self.hits: NDArray[np.int64] = np.zeros(0, np.int64)
        self.total: NDArray[np.float64] = np.zeros(0)
        self.moment: NDArray[np.float64] = np.zeros(0)
        self.high: NDArray[np.float64] = np.zeros(0)

    def add(
        self,
        at: NDArray[np.int64],
        hits: NDArray[np.int64],
        total: NDArray[np.float64],
        moment: NDArray[np.float64],
        high: NDArray[np.float64],
    ) -> None:
        """Add counts in some bins, each named once, ascending."""
        if not len(at):
            return
        self._cover(int(at[0]), int(at[-1]) + 1)
        self.hits[at - self.first] += hits
        self.total[at - self.first] += total
        self.moment[at - self.first] += moment
        self.high[at - self.first] = np.maximum(self.high[at - self.first], high)

    def _cover(self, low: int, high: int) -> None:
        if not len(self.hits):
            self.first, end = low, low
        else:
            end = self.first + len(self.hits)
        before, after = max(0, self.first - low), max(0, high - end)
        if before or after:
            self.first -= before
            for name in ("hits", "total", "moment", "high"):
                setattr(self, name, np.pad(getattr(self, name), (before, after)))


@dataclass(frozen=True, eq=False)
class CentroidSample:
    """Sampled centroids of one section.

    Attributes:
        spectra: How many spectra were looked at.
        mz_range: Lowest and highest m/z of the section as far as they show it; NaN where they are empty.
        at: (B,) bins that hold something, ascending; see `Bins`.
        hits: (B,) spectra with a centroid in the bin.
        total: (B,) sum of the intensities.
        moment: (B,) sum of intensity times m/z.
        high: (B,) the greatest intensity.
    """

    spectra: int
    mz_range: tuple[float, float]
    at: NDArray[np.int64]
    hits: NDArray[np.int64]
    total: NDArray[np.float64]
    moment: NDArray[np.float64]
    high: NDArray[np.float64]

    kind = "centroid"

    def bins(self) -> Bins:
        """All of the bins between the first and the last."""
        out = Bins()
        out.add(self.at, self.hits, self.total, self.moment, self.high)
        return out


@dataclass(frozen=True, eq=False)
class ProfileSample:
    """The mean of sampled profiles of one section.

    Attributes:
        spectra: How many spectra were looked at.
        mz_range: Lowest and highest m/z of the section as far as they show it; NaN where they are empty.
        axis: (A,) m/z, ascending.
        mean: (A,) intensity.
        high: (A,) the intensity that as many spectra reach as an ion has to be in (of more than one, since noise that
            is high for once is no ion); the mean where these are not few.
    """

    spectra: int
    mz_range: tuple[float, float]
    axis: NDArray[np.float64]
    mean: NDArray[np.float64]
    high: NDArray[np.float64]

    kind = "profile"


Sample = CentroidSample | ProfileSample


def sample_centroids(spectra: Spectra, spec: PeakSpec) -> CentroidSample:
    """Count sampled centroid spectra (m/z, intensity)."""
    bins, count, low, high = Bins(), 0, np.inf, -np.inf
    for mz, value in spectra:
        count += 1
        used = value > 0
        if not used.any():
            continue
        mz, value = mz[used], value[used]
        low, high = min(low, float(mz.min())), max(high, float(mz.max()))
        at, where = np.unique((spec.place(mz) / spec.step).astype(np.int64), return_inverse=True)
        total, moment = np.bincount(where, weights=value), np.bincount(where, weights=value * mz)
        greatest = np.zeros(len(at))
        np.maximum.at(greatest, where, value)
        bins.add(at, np.ones(len(at), np.int64), total.astype(np.float64), moment.astype(np.float64), greatest)
    held = np.flatnonzero(bins.hits)
    reach = (low, high) if len(held) else (np.nan, np.nan)
    kept = (bins.hits[held], bins.total[held], bins.moment[held], bins.high[held])
    return CentroidSample(count, reach, held + bins.first, *kept)


class Highest:
    """The greatest values at each of some points, in order.

    Args:
        points: Number of points.
        most: How many values are kept of each.
    """

    def __init__(self, points: int, most: int) -> None:
        self._kept = np.zeros((most, points))

    def add(self, value: NDArray[np.float64], at: NDArray[np.int64] | slice = slice(None)) -> None:
        """Add values, none of them negative, at some points, each named once."""
        for kept in self._kept:
            here = kept[at]
            kept[at], value = np.maximum(here, value), np.minimum(here, value)

    def least(self) -> NDArray[np.float64]:
        """The least of those kept."""
        return self._kept[-1]


def sample_profiles(spectra: Callable[[], Spectra], spec: PeakSpec) -> ProfileSample:
    """What sampled profiles (m/z, intensity) show, which are asked for twice."""
    axis, count, low, high = np.empty(0), 0, np.inf, -np.inf
    for mz, _ in spectra():
        count += 1
        if len(mz):
            low, high = min(low, float(mz[0])), max(high, float(mz[-1]))
        if len(mz) > len(axis):
            axis = mz
    if len(axis) < 3:
        return ProfileSample(count, (np.nan, np.nan), np.empty(0), np.empty(0), np.empty(0))
    # The longest spectrum's own points, filled up where it left points out: fine enough for the instrument.
    axis = filled_axis(np.unique(axis))
    mean, highest = np.zeros(len(axis)), Highest(len(axis), spec.min_spectra)
    for mz, value in spectra():
        if len(mz) > 1:
            here = interpolated(axis, mz, value)
            mean += here
            highest.add(here)
    mean /= count
    return ProfileSample(count, (low, high), axis, mean, highest.least() if spec.few(count) else mean)


def interpolated(axis: NDArray[np.float64], mz: NDArray[np.float64], value: NDArray[np.float64]) -> NDArray[np.float64]:
    """A profile (m/z, intensity) at the points of an axis (A,): zero beyond its ends and where it left points out."""
    here = np.interp(axis, mz, value, left=0.0, right=0.0)
    gap = np.flatnonzero(gaps(np.diff(mz)))
    if len(gap):
        segment = np.clip(np.searchsorted(mz, axis, side="right") - 1, 0, len(mz) - 2)
        here[np.isin(segment, gap) & ~np.isin(axis, mz)] = 0.0
    return here


def filled_axis(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """An axis with one zero-crossing point put on either side of each gap, so that maxima stay separate."""
    step = np.diff(axis)
    gap = np.flatnonzero(gaps(step))
    if not len(gap):
        return axis
    inner = np.minimum(step[np.maximum(gap - 1, 0)], step[np.minimum(gap + 1, len(step) - 1)])
    return np.unique(np.concatenate([axis, axis[gap] + inner, axis[gap + 1] - inner]))


def save_sample(sample: Sample, path: Path) -> None:
    """Keep a sample in a file (NumPy's npz)."""
    np.savez_compressed(path, kind=sample.kind, **vars(sample))


def load_sample(path: Path) -> Sample:
    """What `save_sample` kept."""
    with np.load(path) as data:
        values = {name: data[name] for name in data.files}
    model = CentroidSample if str(values.pop("kind")) == CentroidSample.kind else ProfileSample
    low, high = values.pop("mz_range").tolist()
    return model(spectra=int(values.pop("spectra")), mz_range=(low, high), **values)
