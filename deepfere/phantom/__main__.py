"""``python -m deepfere.phantom OUT``: write a phantom from the command line."""

from __future__ import annotations

import argparse
import sys

from deepfere.errors import InputError
from deepfere.phantom import PhantomSpec, write_phantom


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, write the phantom, return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m deepfere.phantom",
        description="Write an invented section: imzML, pyramidal slide and the truth.",
        epilog="example: python -m deepfere.phantom demo-section --seed 1 --shape 40 36",
    )
    default = PhantomSpec()
    parser.add_argument("out", help="folder to write into")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--shape", type=int, nargs=2, metavar=("NY", "NX"), default=default.shape_px)
    parser.add_argument("--pitch-um", type=float, default=default.pitch_um)
    parser.add_argument("--factor", type=int, default=default.factor)
    parser.add_argument("--slide-mpp-um", type=float, default=default.slide_mpp_um)
    parser.add_argument("--mode", choices=("processed", "continuous"), default=default.mode)
    parser.add_argument("--counts", type=float, default=default.counts, help="0 for no counting noise")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(arguments)
    try:
        spec = PhantomSpec(
            seed=args.seed,
            shape_px=tuple(args.shape),
            pitch_um=args.pitch_um,
            factor=args.factor,
            slide_mpp_um=args.slide_mpp_um,
            mode=args.mode,
            counts=args.counts or None,
        )
        phantom = write_phantom(args.out, spec, _show, overwrite=args.overwrite)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{phantom.imzml}\n{phantom.slide}\n{phantom.truth}")
    return 0


def _show(stage: str, done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{stage} {done}/{total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
