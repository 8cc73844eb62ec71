"""A made-up result for the pages' tests, and what a browser would see of a page."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dask.array as da
import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from deepfere.evaluation.report import MAX_BYTES, write_report
from deepfere.frame import Alignment, Displacement, SectionGrid


class FakeResult:
    """Exactly what a result offers to the report, from a smooth random tissue."""

    def __init__(self, shape=(19, 23), factor=4, ions=5, kinds=None, seed=0, levels=None, path="sample.zarr"):
        rng = np.random.default_rng(seed)
        self.path, self.factor = path, factor
        self.grid = SectionGrid(shape, (50.0, 40.0))
        h, w = shape[0] * factor, shape[1] * factor
        y, x = np.mgrid[:h, :w]
        tissue = ((y / h - 0.5) ** 2 + (x / w - 0.5) ** 2) < 0.2
        self._fine = []
        for k in range(ions):
            image = ndimage.gaussian_filter(rng.random((h, w)), 1.5 + k % 4)
            image = (image - image.min()) / (image.max() - image.min()) * tissue * 10.0 ** (k % 6)
            self._fine.append(image.astype(np.float32))
        means = [image.reshape(shape[0], factor, shape[1], factor).mean((1, 3)) for image in self._fine]
        hole = np.zeros(shape, bool)
        hole[:2], hole[:, -1] = True, True
        fine_hole = np.repeat(np.repeat(hole, factor, 0), factor, 1)
        self._measured = [np.where(hole, np.nan, mean) for mean in means]
        self._fine = [np.where(fine_hole, np.float32(np.nan), image) for image in self._fine]
        self._stain = np.stack([np.where(tissue, c, 240).astype(np.uint8) for c in (200, 120, 170)])
        self.levels = levels or 3
        kinds = kinds or [["stain-informed", "partly", "smooth"][k % 3] for k in range(ions)]
        score = {"stain-informed": 0.6, "partly": 0.2, "smooth": -0.1}
        self.ions = pd.DataFrame(
            {
                "mz": 700.0 + 10.123456 * np.arange(ions),
                "held_out_r2": [score[kind] - 0.001 * k for k, kind in enumerate(kinds)],
                "gate": [{"stain-informed": 0.8, "partly": 0.3, "smooth": 0.0}[kind] for kind in kinds],
                "informed": kinds,
                "null_r2": np.full(ions, -0.05),
                "consistency": np.full(ions, 2e-8),
                "nonneg_steps": [5 * (k % 2) for k in range(ions)],
                "null_mean_r2": np.full(ions, -0.1),
                "noise_share": [(0.6, 0.1, 0.3)[k % 3] for k in range(ions)],
                "chi_square": [(1.02, np.nan, 0.98)[k % 3] for k in range(ions)],
                "inferred_share": [{"stain-informed": 0.25, "partly": 0.05, "smooth": 0.0}[kind] for kind in kinds],
            }
        )
        turn = np.deg2rad(20.0)
        matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        spline = Displacement((0.0, 0.0), (300.0, 300.0), np.full((5, 5, 2), 8.0))
        evidence = {
            "source": "search",
            "held_out_r2": 0.61,
            "runner_up_r2": 0.33,
            "null_r2": [0.1, 0.24],
            "stages": [{"stage": "affine", "r2": 0.61, "kept": True}, {"stage": "spline", "r2": 0.6, "kept": False}],
        }
        self.alignment = Alignment(matrix, np.array([250.0, 300.0]), spline, evidence)
        self.alignment_start: Alignment | None = Alignment(np.eye(2), np.array([150.0, 180.0]))
        self.provenance: dict[str, Any] = {
            "identity": "0123abcd",
            "versions": {"deepfere": "0.1.0", "torch": "2.9"},
            "model": {"tier": "T1", "name": "ridge", "version": "3"},
            "run": {"command": "deepfere fuse"},
            "timings_s": {"ingest": 3.25, "align": 75.0, "reconstruct": 4000.0},
            "config": {"factor": factor},
            "artefacts": {
                "masked": [
                    {
                        "kind": "tear",
                        "area_um2": 72000.0,
                        "measured_px": 9,
                        "evidence": 41.2,
                        "decided_by": "measurement",
                    }
                ],
                "candidates_left_in": 2,
            },
            "warnings": ["12 negative intensities were set to zero"],
        }

    def _at(self, mz: float) -> int:
        return int(np.argmin(np.abs(self.ions["mz"].to_numpy() - mz)))

    @property
    def inferred_share(self) -> float:
        return float(self.ions["inferred_share"].mean())

    def inferred(self, mz: float | None = None, level: int = 0) -> da.Array:
        """Grows from the left to the right, up to twice the share; the more, the more the ion is informed."""
        assert level < self.levels
        share = self.inferred_share if mz is None else self.ions["inferred_share"].iloc[self._at(mz)]
        image = np.where(np.isfinite(self._fine[0]), np.linspace(0, 2 * share, self._fine[0].shape[1]), np.nan)
        return da.from_array(image.astype(np.float32)[:: 2**level, :: 2**level], chunks=(32, 32))

    def ion(self, mz: float, level: int = 0, denoised: bool = False) -> da.Array:
        assert level < self.levels
        if denoised:
            return 0.5 * self.ion(mz, level)
        return da.from_array(self._fine[self._at(mz)][:: 2**level, :: 2**level], chunks=(32, 32))

    def uncertainty(self, mz: float, level: int = 0) -> da.Array:
        assert level < self.levels
        fine = self._fine[self._at(mz)][:: 2**level, :: 2**level]
        return da.from_array(0.1 * fine + np.float32(0.01), chunks=(32, 32))

    def measured(self, mz: float) -> np.ndarray:
        return self._measured[self._at(mz)]

    def stain(self, level: int = 0) -> da.Array:
        return da.from_array(self._stain[:, :: 2**level, :: 2**level], chunks=(3, 32, 32))

    def overview(self) -> tuple[np.ndarray, tuple[float, float]]:
        picture = np.full((60, 70, 3), 235, np.uint8)
        picture[15:45, 15:50] = (190, 110, 160)
        return picture, (25.0, 24.0)

    def artefacts(self) -> np.ndarray:
        kinds = np.zeros((60, 70), np.uint8)
        kinds[20:26, 20:40] = 2
        return kinds


class Page(HTMLParser):
    """Collects what a browser would act on."""

    VOID = frozenset({"meta", "img", "br", "input", "source", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(result: Any, folder: Path, **kwargs: Any) -> tuple[str, Page]:
    path = write_report(result, folder / "report.html", **kwargs)
    assert path == folder / "report.html"
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_self_contained(text: str, page: Page, links: tuple[str, ...] = ()) -> None:
    """It fetches nothing, and links nothing but pages beside it."""
    assert tuple(a["href"] for tag, a in page.tags if tag == "a") == tuple(f"./{quote(link)}" for link in links)
    assert len(text.encode()) < MAX_BYTES
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/") or tag == "a", (tag, name, value)
        if tag == "img":
            assert attributes.get("alt")
    assert tuple(tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed")) == ()
    assert set(re.findall(r"url\((\w+:)", text)) <= {"data:"}
    assert "@import" not in text and "fetch(" not in text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy


def pictures(page: Page) -> list[Image.Image]:
    found: list[Image.Image] = []
    for tag, attributes in page.tags:
        if tag == "img":
            head, data = str(attributes["src"]).split(",", 1)
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            picture.load()
            assert picture.format is not None and picture.format.lower() in head
            found.append(picture)
    return found


def label_block(**changes: Any) -> dict[str, Any]:
    """Scores against a label image, as `evaluate --labels` writes them."""
    picture = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    scores = {"bicubic": (0.61, 0.8, 0.9), "no_guide": (0.62, 0.7, 0.7), "ours": (0.75, None, 0.95)}
    rows = [
        {"method": name, "f1": [f1], "hausdorff95_px": off, "dice": dice, "class_dice": [dice, None], "picture": source}
        for name, (f1, off, dice) in scores.items()
    ]
    return {
        "labels": "/somewhere/annotation.png",
        "classes": [1, 4],
        "colours": ["#4477aa", "#ee6677"],
        "tolerances_px": [0.5],
        "notes": ["class 9 is rare"],
        "picture": source,
        "rows": rows,
    } | changes
