"""OME-NGFF 0.5 metadata of the images that deepfere writes: axes (c, y, x), micrometres, centres in place."""

from __future__ import annotations

from typing import Any

AXES = [
    {"name": "c", "type": "channel"},
    {"name": "y", "type": "space", "unit": "micrometer"},
    {"name": "x", "type": "space", "unit": "micrometer"},
]
AXIS_NAMES = ("c", "y", "x")
SMALLEST_PX = 256


def level_shapes(shape_px: tuple[int, int], least: int = 1) -> list[tuple[int, int]]:
    """Rows and columns of every level: halved (rounded up) until at most 256 px, at least ``least`` levels."""
    out = [shape_px]
    while max(out[-1]) > SMALLEST_PX or len(out) < least:
        if out[-1] == (1, 1):
            break
        out.append((-(-out[-1][0] // 2), -(-out[-1][1] // 2)))
    return out


def multiscale(name: str, pixel_um: tuple[float, float], levels: int, channels: list[str], what: str) -> dict[str, Any]:
    """The ``ome`` attribute of one multiscale group with arrays "0", "1", ...

    Args:
        name: Image name.
        pixel_um: Level 0 pixel size (y, x); its first pixel's outer corner is the section's origin.
        levels: Number of levels; level k averages 2^k x 2^k pixels of level 0.
        channels: Channel labels.
        what: One line for people.
    """
    datasets = []
    for k in range(levels):
        size = [pixel_um[0] * 2**k, pixel_um[1] * 2**k]
        datasets.append(
            {
                "path": str(k),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, *size]},
                    # Values live at pixel centres, so the first centre is half a pixel from the corner.
                    {"type": "translation", "translation": [0.0, size[0] / 2, size[1] / 2]},
                ],
            }
        )
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": AXES,
                "datasets": datasets,
                "type": "mean",
                "metadata": {"description": what, "method": "mean over the pixels of level 0"},
            }
        ],
        "omero": {
            "channels": [
                {"label": label, "color": color, "active": n < 3, "window": window}
                for n, (label, color, window) in enumerate(_channels(channels))
            ]
        },
    }


def _channels(labels: list[str]) -> list[tuple[str, str, dict[str, float]]]:
    if labels == ["red", "green", "blue"]:
        window = {"min": 0.0, "max": 255.0, "start": 0.0, "end": 255.0}
        return list(zip(labels, ["FF0000", "00FF00", "0000FF"], [window] * 3, strict=True))
    window = {"min": -5.0, "max": 5.0, "start": -2.0, "end": 2.0}
    return [(label, "FFFFFF", window) for label in labels]
