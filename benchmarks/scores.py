"""Scores of every method on a case: tables for people, rows for programs, one figure per method for the overview."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from cases import Case, present_ions
from common import Row, signed, table
from methods import STAINED, Runs, ahead, measured
from numpy.typing import NDArray
from oracle import nearest
from scipy.ndimage import uniform_filter

from deepfere.evaluation.evaluate import coverage
from deepfere.evaluation.metrics import consistency, pearson, psnr
from deepfere.phantom import KINDS
from deepfere.reconstruction.result import Result

CONSISTENT = "<= 1e-5"
HELD = "within 0.1 of baseline"
AIMS = {2: 21.2, 4: 18.3}
"""PSNR in dB of the paper's ion under Wald's protocol that the project aims at, by ratio."""
EXAMPLE_MUSTS_DB = {2: {"ion 505": 20.5, "embedding": 18.5}, 4: {"ion 505": 16.8, "embedding": 15.2}}
"""The same that it must reach, blind."""
BLADDER_MUSTS_R = {8: 0.937, 16: 0.855}
"""Median r of the run by default against the 3 x 3-smoothed truth, of square roots (`STABLE`)."""
BLADDER_GAIN = 0.3
"""Share of the oracle's mean gain over the run without the stain that it must reach there."""
STABLE = "3x3-smoothed square-root"
"""The scale on which counting noise is alike everywhere, and on which the bars above were measured: OpenCV's cubic has
.912 (x8) and .827 (x16) there."""
AGAINST = ("raw", "3x3-smoothed", STABLE)
WORST_R = -0.003
"""Change of any ion's r against the run without the stain, at least."""
SHARE = 0.6
"""Share of the oracle's gain that the project aims at on real tissue."""


@dataclass(frozen=True)
class Table:
    """One table of a case.

    Attributes:
        title: What it shows, units included.
        header: Column names; the first column names the row.
        rows: Cells as text.
        notes: Lines below it.
        long: Left out of the page: it is in the JSON.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    long: bool = False

    def text(self) -> str:
        """For a terminal."""
        return "\n".join([table(self.title, self.header, self.rows), *[f"  {note}" for note in self.notes]])


@dataclass
class Scores:
    """What a case came to.

    Attributes:
        rows: Figures.
        tables: Tables.
        overview: Column -> method -> change from no-guide.
    """

    rows: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    overview: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, other: Scores) -> None:
        """Take in what another case, or another part of it, came to."""
        self.rows += other.rows
        self.tables += other.tables
        self.overview |= other.overview

    def plain(self) -> dict[str, Any]:
        """Tables and overview for JSON."""
        return {"tables": [asdict(t) for t in self.tables], "overview": self.overview}


def agreement(case: Case, runs: Runs) -> dict[str, float]:
    """Method -> how far its worst ion contradicts the measurement, ``max |A s - y| / max |y|``.

    Of runs, what they stored when they compared every ion.
    """
    cells = measured(case, runs.results["no-guide"])
    out = {}
    for name in runs.names():
        if name in runs.results:
            out[name] = float(runs.results[name].ions["consistency"].max())
        else:
            pairs = zip(runs.images[name], cells, strict=True)
            out[name] = max(
                consistency(s, y, case.factor) for s, y in pairs if np.isfinite(y).any() and np.isfinite(s).any()
            )
    return out


def agreement_rows(case: Case, runs: Runs, off: dict[str, float]) -> list[Row]:
    """The worst ion of every method; deepfere's own must agree."""
    return [
        Row.of(f"{case.name}: consistency, {name}", value, must=CONSISTENT if name in runs.results else "")
        for name, value in off.items()
        if not (name == "deep" and runs.results["deep"] is runs.results.get("auto"))
    ]


def coverage_scores(case: Case, result: Result, truths: dict[str, NDArray[np.float64]], ions: list[int]) -> Scores:
    """How much of each truth the central 80 % intervals of a result hold, median over some ions.

    The first truth is what the uncertainty speaks of (an instrument with these pixels, its noise included), and must
    be met; the others are for information.

    Args:
        case: The case.
        result: Its result.
        truths: What is compared with -> (M, H, W), for all ions of the case.
        ions: Numbers of those that count.
    """
    near = {m: nearest(result, float(case.mz[m])) for m in ions}
    found = [m for m in ions if near[m] is not None]
    images, sd = (
        np.stack([np.asarray(read(near[m]).compute(scheduler="threads"), np.float64) for m in found])
        for read in (result.ion, result.uncertainty)
    )
    rows: list[Row] = []
    lines = []
    for what, truth in truths.items():
        share = coverage(truth[found], images, sd, case.inside)
        must = "" if rows else HELD
        rows.append(Row.of(f"{case.name}: share of {what} in 80 % intervals", share, "nominal", 0.8, must))
        lines.append([f"share of {what} in 80 % intervals", f"{100 * share:.0f} %"])
        # A truth of 0 on the lower end of its interval counts half: no interval from 0 on holds more than this.
        most = float(np.median([1 - 0.5 * (t[case.inside] == 0).mean() for t in truth[found]]))
        lines.append([f"the most that intervals which end at 0 hold of {what}", f"{100 * most:.0f} %"])
    off = [
        np.sqrt(((t - e)[case.inside] ** 2).mean() / (s[case.inside] ** 2).mean())
        for t, e, s in zip(next(iter(truths.values()))[found], images, sd, strict=True)
    ]
    ratio = float(np.median(off))
    rows.append(Row.of(f"{case.name}: root mean square error over s.d., median ion", ratio, "ideal", 1.0))
    lines.append(["root mean square error over s.d.", f"{ratio:.2f}"])
    title = f"{case.name}: uncertainty, median over {len(found)} ions"
    return Scores(rows, [Table(title, ["", "value"], lines)])


def chi_square_row(case: Case, result: Result, ions: Iterable[int]) -> Row:
    """Reduced chi-square of what the denoised mode takes away, median over some ions."""
    near = [nearest(result, float(case.mz[m])) for m in ions]
    values = result.ions.set_index("mz")["chi_square"][[mz for mz in near if mz is not None]]
    median = float(np.nanmedian(values))
    return Row.of(f"{case.name}: denoised, reduced chi-square", median, "ideal", 1.0, "within 0.1 of baseline")


def alignment_error_px(case: Case, result: Result) -> tuple[float, float]:
    """Median and 90th percentile of |found - true| over the measured pixels, in measured pixels."""
    assert case.alignment is not None and result.alignment is not None
    points = result.grid.centres_um()[result.mask]
    off = np.linalg.norm(case.alignment.map(points) - result.alignment.map(points), axis=1)
    size = np.sqrt(abs(np.linalg.det(case.alignment.matrix))) * float(np.mean(result.grid.pitch_um))
    return float(np.median(off) / size), float(np.percentile(off, 90) / size)


Gains = dict[str, dict[str, NDArray[np.float64]]]
"""Method -> kind -> gains over no-guide of its ions; of no-guide its PSNR."""


def shown(kind: str) -> str:
    """Whether the stain shows a kind of ion."""
    return "in part" if kind == "twin" else "yes" if KINDS[kind] else "no"


def phantom_gains(case: Case, runs: Runs) -> Gains:
    """PSNR in dB (peak: the ion's largest true value) of every method, from no-guide."""
    scores = {
        name: np.array(
            [
                psnr(t, e, case.inside, float(t[case.inside].max())) if np.isfinite(e).any() else np.nan
                for t, e in zip(case.truth, runs.images[name], strict=True)
            ]
        )
        for name in runs.names()
    }
    base, labels = scores["no-guide"], np.array(case.labels)
    kinds = [kind for kind in KINDS if (np.isfinite(base) & (labels == kind)).any()]
    chosen = {kind: np.isfinite(base) & (labels == kind) for kind in kinds}
    return {
        name: {kind: values[at] - (0.0 if name == "no-guide" else base[at]) for kind, at in chosen.items()}
        for name, values in scores.items()
    }


def gain_table(title: str, gains: Gains, off: dict[str, float] | None, notes: list[str]) -> Table:
    """Mean gains per method and kind, the worst ion, and how far the measurement is contradicted."""
    kinds = list(gains["no-guide"])
    rest = ["worst ion", "off the measurement"] if off else []
    rows = [
        ["(stain shows it)", *[shown(kind) for kind in kinds], *[""] * len(rest)],
        ["(ions)", *[str(len(gains["no-guide"][kind])) for kind in kinds], *[""] * len(rest)],
    ]
    for name, values in gains.items():
        plain = name == "no-guide"
        cells = [f"{v.mean():.2f}" if plain else signed(v.mean(), 2) for v in values.values()]
        if off:
            cells += ["" if plain else signed(min(v.min() for v in values.values()), 2), f"{off[name]:.0e}"]
        rows.append([name, *cells])
    return Table(title, ["", *kinds, *rest], rows, notes)


def phantom_scores(case: Case, runs: Runs) -> tuple[Scores, Gains]:
    """PSNR gains over no-guide per kind of ion, and how far the alignment is off."""
    gains, off = phantom_gains(case, runs), agreement(case, runs)
    out = Scores()
    for kind, base in gains["no-guide"].items():
        plain = float(base.mean())
        for name in runs.names("no-guide"):
            gain = float(gains[name][kind].mean())
            must = ("> baseline" if KINDS[kind] else "within 0.05 of baseline") if name == runs.ours else ""
            what = f"{case.name}: {kind}, {name} ({gain:+.3f}), PSNR dB"
            if name != "denoised":
                out.rows.append(Row.of(what, plain + gain, "no-guide", plain, must))
        for against in ("opencv", runs.ours):
            value, bar = (plain + float(gains[name][kind].mean()) for name in ("denoised", against))
            out.rows.append(Row.of(f"{case.name}: {kind}, denoised, PSNR dB", value, against, bar, ">= baseline"))
    chi_square = chi_square_row(case, runs.results[runs.ours], range(len(case.mz)))
    out.rows.append(chi_square)
    missing = int(np.isnan(runs.images["no-guide"]).all((1, 2)).sum())
    denoised = f"denoised: reduced chi-square {chi_square.value:.2f} (median over the ions)"
    notes = [*runs.notes, denoised, *([f"{missing} true ions not found by peak picking"] if missing else [])]
    title = f"{case.name}: PSNR dB of no-guide, and gains over it of the others, mean over ions"
    out.tables.append(gain_table(title, gains, off, notes))
    lines = []
    for name, result in runs.results.items():
        if result.alignment is not None:
            median, p90 = alignment_error_px(case, result)
            lines.append([name, f"{median:.3f}", f"{p90:.3f}"])
            out.rows.append(Row.of(f"{case.name}: alignment error, {name}, median, measured pixels", median))
            out.rows.append(Row.of(f"{case.name}: alignment error, {name}, P90, measured pixels", p90))
    out.tables.append(Table(f"{case.name}: alignment error, measured pixels", ["", "median", "P90"], lines))
    out.rows += agreement_rows(case, runs, off)
    return out, gains


def phantom_summary(seeds: list[int], gains: list[Gains], ours: str) -> Scores:
    """Means over generated sections."""
    pooled: Gains = {
        name: {kind: np.concatenate([g[name][kind] for g in gains if kind in g[name]]) for kind in gains[0][name]}
        for name in gains[0]
    }
    out = Scores()
    if len(seeds) > 1:
        title = f"generated sections, seeds {', '.join(map(str, seeds))}: PSNR dB of no-guide, gains of the others"
        notes = ["mean over the ions of all sections"]
        for kind in pooled["no-guide"]:
            best = ahead({name: float(values[kind].mean()) for name, values in pooled.items()}, ours)
            notes += [f"baselines ahead of {ours} for {kind}: {', '.join(best)}"] if best else []
        out.tables.append(gain_table(title, pooled, None, notes))
    for what, informed in (("shows", True), ("does not show", False)):
        out.overview[f"generated sections, ions that the stain {what}, dB"] = {
            name: float(np.concatenate([v for kind, v in values.items() if KINDS[kind] == informed]).mean())
            for name, values in pooled.items()
            if name != "no-guide"
        }
    return out


def bladder_scores(case: Case, runs: Runs) -> Scores:
    """Pearson r per ion against the real 10 um image: raw, smoothed 3 x 3, and of square roots, smoothed."""
    present, off = present_ions(case), agreement(case, runs)
    chi_square = chi_square_row(case, runs.results[runs.ours], present)
    out = Scores([chi_square])
    for kind in AGAINST:
        out.add(_bladder_against(kind, case, runs, present, off))
    denoised = f"denoised: reduced chi-square {chi_square.value:.2f} (median over {len(present)} ions)"
    out.tables[-1].notes.extend([*runs.notes, denoised])
    out.rows += agreement_rows(case, runs, off)
    return out


def _bladder_against(kind: str, case: Case, runs: Runs, present: list[int], off: dict[str, float]) -> Scores:
    """One of `AGAINST`: its table, its rows, and what it must meet."""
    names, stable, smoothed = runs.names(), kind == STABLE, kind != "raw"

    def scale(images: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.sqrt(np.maximum(images, 0)) if stable else images

    truth = scale(case.truth[present])
    if smoothed:
        truth = np.stack([uniform_filter(t, 3, mode="nearest") for t in truth])
    r = {
        name: np.array(
            [pearson(t, scale(runs.images[name][m]), case.inside) for t, m in zip(truth, present, strict=True)]
        )
        for name in names
    }
    base, lines, out = r["no-guide"], list[list[str]](), Scores()
    for against in ("opencv", runs.ours):
        bar, must = float(np.median(r[against])), ">= baseline" if smoothed else ""
        what = f"{case.name}: denoised, {kind}, median r"
        out.rows.append(Row.of(what, float(np.median(r["denoised"])), against, bar, must))
    ceiling = float((r["oracle"] - base).mean())
    for name in names:
        change = r[name] - base
        if name == "no-guide":
            lines.append([name, f"{np.median(base):.4f}", *[""] * 5, f"{off[name]:.0e}"])
            continue
        # Where no run before differs, neither does this one: rounding is not a change.
        better, worse = int((change > 1e-5).sum()), int((change < -1e-5).sum())
        share = float(change.mean()) / ceiling if ceiling > 0 else float("nan")
        spread = [signed(value, 4) for value in (change.mean(), change.min(), change.max())]
        counts = [f"{better} / {worse} of {len(present)}", f"{100 * share:.0f} %", f"{off[name]:.0e}"]
        lines.append([name, f"{np.median(r[name]):.4f}", *spread, *counts])
        what, judged = f"{case.name}: {name}, {kind}", name == runs.ours and case.factor in BLADDER_MUSTS_R
        must = f">= {BLADDER_MUSTS_R[case.factor]}" if judged and stable else ""
        out.rows.append(Row.of(f"{what}, median r", np.median(r[name]), "no-guide", np.median(base), must))
        must = f">= {WORST_R}" if judged and smoothed else ""
        out.rows.append(Row.of(f"{what}, worst ion's change of r (aim >= 0)", change.min(), must=must))
        out.rows.append(Row.of(f"{what}, ions better than no-guide", better, "ions", len(present)))
        aim = "mean change of r (aim 60 % of the oracle's)"
        must = f">= {BLADDER_GAIN * ceiling:.4f}" if judged and smoothed else ""
        out.rows.append(Row.of(f"{what}, {aim}", change.mean(), "oracle", ceiling, must))
        if stable:
            column = out.overview.setdefault(f"{case.name}, mean r", {})
            column[name] = float(change.mean())
    mine = r[runs.ours] - base
    reached = "reached" if ceiling > 0 and mine.mean() >= SHARE * ceiling else "missed"
    notes = [
        f"aim of {runs.ours}: {100 * SHARE:.0f} % of the oracle's mean gain: {reached}",
        f"aim of {runs.ours}: no ion worse than without the stain: "
        f"{'reached' if mine.min() >= -1e-5 else f'missed by {-mine.min():.4f}'}",
    ]
    header = ["", "median r", "mean change", "worst", "best", "better / worse", "of oracle's gain"]
    title = f"{case.name}: r against the {kind} truth, {len(present)} ions; changes from no-guide"
    out.tables.append(Table(title, [*header, "off the measurement"], lines, notes))
    if not smoothed:
        lines = [[f"{case.mz[m]:.3f}", *[f"{r[name][n]:.3f}" for name in names]] for n, m in enumerate(present)]
        out.tables.append(Table(f"{case.name}: r of every ion, raw", ["m/z", *names], lines, long=True))
    return out


def example_scores(case: Case, runs: Runs, ratio: int) -> Scores:
    """PSNR (peak 1) on tissue of the paper's example."""
    aim, off = AIMS[ratio], agreement(case, runs)
    parts = {"ion 505": [3], "embedding": [0, 1, 2]}
    out, lines = Scores(), []

    def score(name: str, index: list[int]) -> float:
        inside = np.broadcast_to(case.inside, (len(index), *case.inside.shape))
        return psnr(case.truth[index], runs.images[name][index], inside, 1.0)

    base = {part: score("no-guide", index) for part, index in parts.items()}
    for name in runs.names():
        cells = []
        plain = name == "no-guide"
        # All that use the stain use the alignment that was given then.
        given = runs.refused and name in STAINED
        for part, index in parts.items():
            value = score(name, index)
            if not np.isfinite(value):  # the method was run on the ion alone
                cells += ["", ""]
                continue
            cells += [f"{value:.2f}", "" if plain else signed(value - base[part], 2)]
            where = ", full-scale alignment" if given else ""
            goal = f" (aim >= {aim})" if part == "ion 505" else ""
            if not plain:
                what = f"{case.name}: {part}, {name}{where}, PSNR dB{goal}"
                must = f">= {EXAMPLE_MUSTS_DB[ratio][part]}" if name == runs.ours and not given else ""
                out.rows.append(Row.of(what, value, "no-guide", base[part], must))
                column = out.overview.setdefault(f"{case.name}, {part}, dB", {})
                column[name] = value - base[part]
        r = pearson(case.truth[3], runs.images[name][3], case.inside)
        lines.append([name + (" †" if given else ""), *cells, f"{r:.3f}", f"{off[name]:.0e}"])
    header = ["", "ion 505", "gain", "embedding", "gain", "ion r", "off the measurement"]
    title = f"{case.name}: PSNR dB, peak 1, on tissue; gains over no-guide"
    mine = score(runs.ours, [3])
    reached = "reached" if mine >= aim else f"missed by {aim - mine:.2f} dB"
    notes = [
        *(["† with the full-scale alignment"] if runs.refused else []),
        *runs.notes,
        f"aim of {runs.ours}: ion 505 at {aim} dB or more: {reached}",
    ]
    out.tables.append(Table(title, header, lines, notes))
    out.rows += agreement_rows(case, runs, off)
    return out
