"""Computing the detail planes and the stain on the section grid, one whole output shard at a time.

A shard's objects are deleted before they are written, and recorded in the journal afterwards with what they came to; a
rerun computes only what is not recorded, or no longer there (`deepfere.reconstruction.whole`). Pixels
stay in the worker.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deepfere.cluster import Journal
from deepfere.errors import InputError
from deepfere.frame import Alignment
from deepfere.measured.operator import fill_missing, spline_coefficients
from deepfere.model.detail import DetailModel, KnownDetail, as_bytes, pooled_window
from deepfere.model.guide import Cells, GuideSpec, stain_of
from deepfere.model.network import network_from_config
from deepfere.places import reading
from deepfere.schedule import RowWorker
from deepfere.store import open_group, write_shard
from deepfere.tiling.cache import CacheSpec, PlaneReader, slide_of, write_planes
from deepfere.tiling.plan import ShardGrid

TILE_PX, GPU_TILE_PX = 384, 1024
"""Windows are computed in tiles of about this side, which bounds the memory of a worker; on a GPU larger ones, so that
each of its kernels has enough to do."""


@dataclass(frozen=True)
class SectionModel:
    """A fitted section, by plain values and paths, as it travels to the workers.

    Attributes:
        spec: `GuideSpec.to_dict`.
        alignment: `Alignment.to_dict`.
        arrays: Path or URL (as of all files here) of an .npz with ``factors`` (K, ny, nx), ``mask``, ``weights``
            (R, K), ``centre`` (3,) and ``gate`` (K,).
        cache: URL of the plane cache.
        network: Settings of the network, or None (T1).
        state: Path of its weights (safetensors), or None.
        known: .npz with ``detail`` (K, H, W) and ``cover`` of the whole section, where they are computed already.
    """

    spec: dict[str, Any]
    alignment: dict[str, Any]
    arrays: str
    cache: str
    network: dict[str, int] | None
    state: str | None
    known: str | None = None

    def build(self, device: str = "cpu") -> DetailModel | KnownDetail:
        """Load everything into memory; the network goes to the device."""
        spec = GuideSpec.from_dict(self.spec)
        with reading(self.arrays) as path, np.load(path) as data:
            mask, factors = data["mask"], data["factors"]
            coefficients = spline_coefficients(fill_missing(factors, mask))
            weights, gate, centre = data["weights"], data["gate"], data["centre"]
        alignment = Alignment.from_dict(self.alignment)
        if self.known is not None:
            with reading(self.known) as path, np.load(path) as data:
                return KnownDetail(spec, alignment, gate, mask, data["detail"], data["cover"])
        network = None
        if self.network is not None:
            from safetensors.torch import load_file

            network = network_from_config(self.network)
            with reading(str(self.state)) as path:
                network.load_state_dict(load_file(str(path)))
            network.eval().to(device)
        return DetailModel(spec, alignment, weights, centre, network, gate, coefficients, mask, device)


def tiles(cells: Cells, factor: int, tile_px: int = TILE_PX) -> list[Cells]:
    """Disjoint windows of at most ``tile_px`` that cover a window of measured pixels."""
    side = max(1, tile_px // factor)
    return [
        Cells(i, min(i + side, cells.i1), j, min(j + side, cells.j1))
        for i in range(cells.i0, cells.i1, side)
        for j in range(cells.j0, cells.j1, side)
    ]


class CacheWorker(RowWorker):
    """Decodes the slide into a group of neighbouring shards of the plane cache per row (``shards``)."""

    def __init__(self, spec: CacheSpec, journal: str, fingerprint: str) -> None:
        self._spec, self._recorded = spec, Journal(journal, fingerprint)

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write and record the shards of one group, one after the other."""
        for r, c in row["shards"]:
            before = slide_of(self._spec).decoded
            written, damaged = write_planes(self._spec, r, c)
            after = slide_of(self._spec).decoded
            decoded = None if before is None or after is None else after - before
            found = {"damaged": damaged.places} if damaged else {}
            self._recorded.record({f"{r}/{c}": {"decoded": decoded, "wrote": {"planes": written}} | found})
        return {"shards": len(row["shards"])}


class PoolWorker(RowWorker):
    """Averages the stain features over the footprints of one window of measured pixels per row."""

    def __init__(
        self, spec: dict[str, Any], alignment: dict[str, Any], cache: str, out: str, smoothings_pitch: list[float]
    ) -> None:
        self._spec, self._alignment = GuideSpec.from_dict(spec), Alignment.from_dict(alignment)
        self._smoothings = smoothings_pitch
        self._planes, self._out = PlaneReader(cache, self._spec), out

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write one window of the pooled features (S F + 1, h, w): features at every smoothing, and cover."""
        whole = Cells(*row["cells"])
        group: Any = open_group(self._out, "r+")["pooled"]
        block = np.zeros((group.shape[0], *whole.shape))
        for cells in tiles(whole, self._spec.factor):
            features, cover = pooled_window(self._spec, self._alignment, self._planes, cells, self._smoothings)
            features = features.reshape(-1, *cover.shape)
            window = (slice(cells.i0 - whole.i0, cells.i1 - whole.i0), slice(cells.j0 - whole.j0, cells.j1 - whole.j0))
            block[(slice(None), *window)] = np.concatenate([features, cover[None]])
        group[:, whole.i0 : whole.i1, whole.j0 : whole.j1] = block
        return {}


def exact_gpu() -> None:
    """Make this process's GPU round as little as float32 does, and the same way every time.

    Raises:
        InputError: PyTorch sees none here.
    """
    if not torch.cuda.is_available():
        raise InputError(
            f"PyTorch {torch.__version__} sees no GPU on {socket.gethostname()}",
            where="reconstruct.use_gpu",
            remedy="set it to false, or install a build of PyTorch that fits the driver there",
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


class DetailWorker(RowWorker):
    """Reconstructs one output shard per row: detail planes (K) and the stain (RGB)."""

    def __init__(
        self,
        model: SectionModel,
        out: str,
        shards: ShardGrid,
        journal: str,
        fingerprint: str,
        scale: list[float],
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(1)
        if device != "cpu":
            exact_gpu()
        self._device, self._tile_px = device, TILE_PX if device == "cpu" else GPU_TILE_PX
        self._model = model.build(device)
        self._planes = PlaneReader(model.cache, self._model.spec)
        self._out, self._shards = out, shards
        self.journal = Journal(journal, fingerprint)
        self._scale = np.asarray(scale, np.float32)[:, None, None]

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute and write one shard; on disk when this returns."""
        whole, f = self._shards.cells(row["row"], row["col"]), self._shards.factor
        height, width = whole.shape[0] * f, whole.shape[1] * f
        detail = np.zeros((len(self._model.gate), height, width), np.float32)
        stain = np.full((3, height, width), 255, np.uint8)
        uncovered = 0
        for cells in tiles(whole, f, self._tile_px):
            inside = self._model.mask[cells.i0 : cells.i1, cells.j0 : cells.j1]
            rows = slice((cells.i0 - whole.i0) * f, (cells.i1 - whole.i0) * f)
            cols = slice((cells.j0 - whole.j0) * f, (cells.j1 - whole.j0) * f)
            if inside.any() and self._model.gate.any():
                detail[:, rows, cols], cover, stain[:, rows, cols] = self._model.with_stain(self._planes, cells)
                seen = cover.reshape(cells.shape[0], f, cells.shape[1], f).mean((1, 3)) >= 0.99
                uncovered += int((inside & ~seen).sum())
            else:
                colours, _ = stain_of(self._model.spec, self._planes, self._model.alignment, cells, self._device)
                stain[:, rows, cols] = as_bytes(colours)
        group: Any = open_group(self._out, "r+")
        wrote = {
            f"{name}/0": write_shard(self._out, group[name]["0"], row["row"], row["col"], values)
            for name, values in (("detail", (detail / self._scale).astype(np.float16)), ("stain", stain))
        }
        return {"uncovered": uncovered, "wrote": wrote}
