"""The networks on a device, against what it can do at most: ``python benchmarks/gpu.py [--device cuda] [--json FILE]``.

Needs torch and numpy alone, so that it runs on a bare machine with this repository on its ``PYTHONPATH``. Ceilings,
measured in the same run: products of large square matrices (MAC/s), and copies of a large array (bytes/s). Against
them: the deep model's forward pass on one tile, what a section's own last layer needs (`regress`), and a training step
(forward, backward, Adam: three forward passes of MACs), in float32 and in bfloat16, and as `torch.compile` makes it;
and the published model's fusion network for the same pixels. Each is the best of some rounds, after one to warm up.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepfere.model import paper
from deepfere.model.network import FusionNetwork

FEATURES, FACTORS, WIDTH, DEPTH = 11, 16, 32, 3
"""Of the default settings, a section with as many factors as they allow."""
SIDE_PX, QUICK_PX = 1024, 128
PAPER_CHANNELS = 3
ROUNDS = 5
MATRIX, QUICK_MATRIX = 8192, 512
COPIED, QUICK_COPIED = 1 << 30, 1 << 24


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """The best of some rounds, the device waited for."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(rounds))


def macs_of(network: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-accumulates of one forward pass: of every convolution, by the shapes that pass through it."""
    total = 0

    def count(layer: Any, given: Any, made: torch.Tensor) -> None:
        nonlocal total
        total += made.numel() * layer.weight[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    with torch.inference_mode():
        network(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """MAC/s of matrix products in both precisions, and bytes/s of a copy (read and written)."""
    side, size = (QUICK_MATRIX, QUICK_COPIED) if quick else (MATRIX, COPIED)
    out = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out[f"MAC/s, {name}"] = side**3 / seconds(lambda a=a, b=b: a @ b, device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    out["bytes/s"] = 2 * size / seconds(lambda: target.copy_(source), device)
    return out


def activation_bytes(network: FusionNetwork, item: int) -> int:
    """What one pixel's values come to, each read and written once by every layer: a floor for unfused layers."""
    f, k, w, n = (network.settings[name] for name in ("features", "factors", "width", "depth"))
    read = 2 * f + 2 * w + 2 * k + n * 3 * w + w
    written = k + 2 * w + 2 * k + w + n * 3 * w + k
    return item * (read + written)


def rows_of(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """One row for each way of working: what, precision, Mpx/s, MAC/s, and its shares of the ceilings."""
    side = QUICK_PX if quick else SIDE_PX
    most = ceilings(device, quick)
    rows: list[dict[str, Any]] = [{"what": f"ceiling: {name}", "value": value} for name, value in most.items()]
    torch.manual_seed(0)
    network = FusionNetwork(FEATURES, FACTORS, WIDTH, DEPTH).to(device)
    wide = side + 2 * network.radius_px
    stain, up = torch.randn(1, FEATURES, wide, wide, device=device), torch.randn(1, FACTORS, wide, wide, device=device)
    wanted = torch.randn(1, FACTORS, side, side, device=device)
    optimiser = torch.optim.Adam(network.parameters())

    def add(what: str, precision: str, work: Callable[[], Any], macs_per_px: float, bytes_per_px: float | None) -> None:
        mixed = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
        try:
            with mixed:
                took_s = seconds(work, device, 2 if quick else ROUNDS)
        except Exception as error:  # a compiler that is not there: the row says so
            rows.append({"what": what, "precision": precision, "failed": f"{type(error).__name__}: {error}"[:200]})
            print(rows[-1], file=sys.stderr, flush=True)
            return
        rate = side**2 / took_s
        row = {"what": what, "precision": precision, "Mpx/s": rate / 1e6, "MAC/s": rate * macs_per_px}
        row["share of the matrix ceiling"] = row["MAC/s"] / most[f"MAC/s, {precision}"]
        if bytes_per_px is not None:
            row["share of the memory ceiling"] = rate * bytes_per_px / most["bytes/s"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)  # compiling takes minutes

    def infer(net: Callable[..., Any], *inputs: torch.Tensor) -> Callable[[], Any]:
        def work() -> Any:
            with torch.inference_mode():
                return net(*inputs)

        return work

    def train(net: Callable[..., Any]) -> Callable[[], Any]:
        def work() -> None:
            optimiser.zero_grad(set_to_none=True)
            (net(stain, up).float() - wanted).square().mean().backward()
            optimiser.step()

        return work

    macs = network.macs_per_px
    for precision, item in (("float32", 4), ("bfloat16", 2)):
        moved = activation_bytes(network, item)
        add("forward", precision, infer(network, stain, up), macs, moved)
        add("regressors of a section's last layer", precision, infer(network.regress, stain, up), macs, moved)
        add("training step", precision, train(network), 3 * macs, None)
        compiled = torch.compile(network)
        add("forward, compiled", precision, infer(compiled, stain, up), macs, moved)
        add("training step, compiled", precision, train(compiled), 3 * macs, None)
    published = paper.Fusion(PAPER_CHANNELS).to(device)
    x, mapped = (torch.rand(1, PAPER_CHANNELS, side, side, device=device) for _ in range(2))
    theirs = macs_of(published, x, mapped) / side**2
    for precision in ("float32", "bfloat16"):
        add("published fusion network, forward", precision, infer(published, x, mapped), theirs, None)
    rows.append({"what": "multiply-accumulates a pixel", "value": float(macs), "published fusion network": theirs})
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    columns = ["what", "precision", "Mpx/s", "MAC/s", "share of the matrix ceiling", "share of the memory ceiling"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---" + "|---:" * 4 + "|"]
    for row in rows:
        if "value" in row:
            more = f" ({row['published fusion network']:.3g})" if "published fusion network" in row else ""
            lines.append(f"| {row['what']} | {row['value']:.3g}{more} | | | | |")
        elif "failed" in row:
            lines.append(f"| {row['what']} | {row['precision']} | failed: {row['failed'].splitlines()[0]} | | | |")
        else:
            cells = [f"{row[name]:.3g}" if name in row else "" for name in columns[2:]]
            lines.append(f"| {row['what']} | {row['precision']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small arrays: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device and rows")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = rows_of(device, given.quick)
    print(f"{name}, torch {torch.__version__}\n\n{text(rows)}")
    if given.json:
        given.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
