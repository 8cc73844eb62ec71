"""What deepfere writes: ingested measurements, results, image pyramids, and unfinished work."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepfere.cluster import records_in
from deepfere.errors import InputError
from deepfere.inspect.files import add_alignment
from deepfere.inspect.notes import Description, Notes, add_mask, count_text, pair_text, sample, size_text
from deepfere.inspect.raw import slide
from deepfere.places import Place

STAGES = ("sample", "ions", "ingest", "align", "tile", "learn", "reconstruct")
SHARD_SAMPLE = 64


def zarr_group(path: str) -> Description:
    """A Zarr group at a path or URL, by what its attributes say.

    Raises:
        InputError: It is none, or of no kind that is known.
    """
    from deepfere.measured import store as measured_store
    from deepfere.store import open_foreign

    group = open_foreign(path)
    attrs: dict[str, Any] = dict(group.attrs)
    kind = attrs.get("format")
    if kind == measured_store.FORMAT:
        return _measured(path, attrs)
    if kind == "deepfere-result":
        return _result(path, attrs)
    ome = attrs["ome"] if isinstance(attrs.get("ome"), dict) else attrs
    if not ome.get("multiscales") and ome.get("bioformats2raw.layout") is None:
        raise InputError(
            "is a Zarr group of no kind that deepfere knows",
            where=path,
            remedy="give a measurement, a result or an image",
        )
    try:
        return slide(path)
    except InputError as error:
        if not ome.get("multiscales"):
            raise
        return _pyramid(path, group, ome, error.what)


def _measured(path: str, attrs: dict[str, Any]) -> Description:
    from deepfere.measured.lock_mass import told
    from deepfere.measured.store import open_measured

    notes, kind = Notes(), "ingested measurement"
    try:
        measured = open_measured(path)
    except InputError as error:
        notes.add("format version", attrs.get("format_version"))
        notes.problem(f"{error.what}; {error.remedy}")
        return notes.done(path, kind)
    except Exception as error:  # a store that lost files makes Zarr raise many things
        notes.problem(f"cannot be opened ({type(error).__name__}: {error}); ingest again")
        return notes.done(path, kind)
    mz, a = measured.mz, measured.attrs
    notes.add("source", ", ".join(str(name) for name in a.get("source", [])))
    notes.add("written by", a.get("written_by"))
    notes.add(
        "pitch", f"{pair_text(measured.grid.pitch_um)} um" + (", as given" if a.get("pitch_source") == "given" else "")
    )
    how = {"axis": "the file's own axis", "list": "a target list", "automatic": "automatic peaks"}.get(
        a.get("ions", "")
    )
    if how == "automatic peaks" and (sections := a.get("peaks", {}).get("sections")):
        how += f" of {sections} sections"
    notes.add("m/z", f"{count_text(len(mz), 'ion')}, {mz[0]:.4f} to {mz[-1]:.4f}" + (f" ({how})" if how else ""))
    notes.add("tolerance", str(measured.tolerance))
    for key in ("mode", "representation", "polarity"):
        notes.add(key, a.get(key))
    if "lock_mass" in a:
        notes.add("lock mass", told(a["lock_mass"]).removeprefix("lock mass "))
    if "profile" in a:
        notes.add("profiles", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in a["profile"].items()))
    notes.add("reference m/z", a.get("reference_mz"))
    origin = a.get("origin_px", [0, 0])
    notes.add("origin", f"x {origin[1]}, y {origin[0]} in the file's coordinates")
    add_mask(notes, measured.mask, measured.grid.pitch_um)
    for key, text in (("duplicate_spectra", "repeated spectra"), ("negative_intensities", "negatives set to zero")):
        if a.get(key):
            notes.add(text, f"{a[key]:,}")
    if a.get("uuid_matches") is False:
        notes.add("identifier", "the .ibd did not begin with the one that the .imzML states")
    _check_shards(notes, path, {"ions": measured.ions}, measured.mask, {"ions": 1})
    return notes.done(path, kind)


def _check_shards(
    notes: Notes, path: str, arrays: dict[str, Any], mask: NDArray[np.bool_], needed: dict[str, int]
) -> None:
    """Look for the shards of arrays (first axis, y, x) and decode a sample of them.

    Args:
        notes: Gets what is missing or broken, and how much was looked at.
        path: The store; a URL is not checked, as that takes a request for every shard.
        arrays: Name in the store to Zarr array.
        mask: (ny, nx) True where measured.
        needed: Arrays of which every shard with a measured pixel must be there, with their pixels per measured
            pixel. Of others, a shard that holds the fill value alone is rightly absent.
    """
    from deepfere.remote import is_url

    if is_url(path):
        notes.add("shards", "not looked for in a remote store")
        return
    found = tried = 0
    for name, array in arrays.items():
        counts = tuple(-(-n // s) for n, s in zip(array.shape, array.shards, strict=True))
        wanted = np.zeros(counts[1:], bool)
        if name in needed:
            rows, cols = np.nonzero(mask)
            side_y, side_x = (side // needed[name] for side in array.shards[1:])
            wanted[rows // side_y, cols // side_x] = True
        present, lost = [], 0
        for place in np.ndindex(counts):
            if (Path(path) / name / array.metadata.encode_chunk_key(place)).exists():
                present.append(place)
            elif wanted[place[1:]]:
                lost += 1
        if lost:
            notes.problem(f"{name}: {lost:,} of {len(present) + lost:,} shards are missing")
        chosen = [present[k] for k in sample(len(present), SHARD_SAMPLE)] if present else []
        found, tried = found + len(present), tried + len(chosen)
        for place in chosen:
            try:
                array[tuple(slice(k * s, k * s + 1) for k, s in zip(place, array.shards, strict=True))]
            except Exception as error:  # codecs raise whatever they like
                notes.problem(f"{name}: shard {'/'.join(map(str, place))} is damaged ({type(error).__name__}: {error})")
                break
    notes.add("shards", f"{found:,} present, {tried:,} of them tried")


def _result(path: str, attrs: dict[str, Any]) -> Description:
    from deepfere.reconstruction.result import open as open_result

    notes, kind = Notes(), "result"
    try:
        result = open_result(path)
        ions = result.ions
    except InputError as error:
        notes.add("identity", attrs.get("identity"))
        notes.problem(f"{error.what}; {error.remedy}")
        return notes.done(path, kind)
    except Exception as error:  # a store that lost files makes Zarr, pandas and JSON raise many things
        notes.problem(f"cannot be opened ({type(error).__name__}: {error}); run the same command with --overwrite")
        return notes.done(path, kind)
    grid, fine = result.grid, result.grid.refine(result.factor)
    notes.add("pitch", f"{pair_text(grid.pitch_um)} um measured, {pair_text(fine.pitch_um)} um reconstructed")
    notes.add("factor", result.factor)
    notes.add("size", size_text(fine.shape_px, fine.pitch_um))
    notes.add("levels", result.levels)
    notes.add("m/z", f"{count_text(len(ions), 'ion')}, {ions['mz'].min():.4f} to {ions['mz'].max():.4f}")
    counts = Counter(ions["informed"])
    named = ["stain-informed", "partly", "smooth", *(["not judged"] if counts["not judged"] else [])]
    notes.add("informed", ", ".join(f"{counts[name]} {name}" for name in named))
    notes.add("consistency", f"{ions['consistency'].max():.1e} of an ion's maximum at worst")
    notes.add("normalisation", result.normalisation)
    add_mask(notes, result.mask, grid.pitch_um)
    arrays = {"measured/ions": result._measured.ions}
    for image in ("detail", "stain"):
        for level in range(result.levels if image in result._group else 0):
            if str(level) in result._group[image]:
                arrays[f"{image}/{level}"] = result._group[image][str(level)]
            else:
                notes.problem(f"{image}/{level} is missing")
    # Detail of nothing but zeros has no shards; the stain of a measured pixel always has one.
    _check_shards(notes, path, arrays, result.mask, {"measured/ions": 1, "stain/0": result.factor})
    _add_papers(notes, path, result)
    return notes.done(path, kind)


def _add_papers(notes: Notes, path: str, result: Any) -> None:
    """Alignment and provenance."""
    from deepfere.training.mlflow_store import redact

    try:
        alignment, provenance = result.alignment, result.provenance
    except InputError as error:
        notes.problem(f"alignment.json: {error.what}")
        return
    except (OSError, ValueError) as error:
        notes.problem(f"provenance.json cannot be read ({error})")
        return
    if alignment is None:
        notes.add("stain", "none: reconstructed without the slide")
        if "stain" in result._group:
            notes.problem("alignment.json is missing")
    else:
        inner = Notes()
        add_alignment(inner, alignment)
        notes.facts += [(f"alignment, {key.removeprefix('evidence, ')}", value) for key, value in inner.facts]
    model, run = provenance.get("model") or {}, provenance.get("run") or {}
    named = [f"{model['name']} version {model.get('version')}"] if model.get("name") else []
    notes.add("model", ", ".join([f"tier {model.get('tier')}", *named]))
    notes.add("run", f"{run['run_id']} at {redact(str(run.get('uri')))}" if run.get("run_id") else "not tracked")
    tiles = (provenance.get("slide") or {}).get("native_tiles")
    if tiles:
        notes.add("slide's own tiles", f"{tiles['decoded']} decoded, {tiles['distinct']} different ones")
    times = provenance.get("timings_s") or {}
    notes.add("time", ", ".join(f"{stage} {seconds:g} s" for stage, seconds in times.items()))
    notes.add("made by", f"deepfere {(provenance.get('versions') or {}).get('deepfere', '?')}")
    notes.add("identity", provenance.get("identity"))
    for text in provenance.get("warnings") or []:
        notes.add("warning", text)


def _pyramid(path: str, group: Any, ome: dict[str, Any], no_slide: str) -> Description:
    """An image that cannot be used as a slide, and why."""
    notes = Notes()
    notes.add("as a slide", no_slide)
    for image in ome["multiscales"]:
        axes = image.get("axes", [])
        notes.add("image", image.get("name"))
        notes.add("axes", ", ".join(f"{a['name']} ({a['unit']})" if a.get("unit") else a["name"] for a in axes))
        for dataset in image.get("datasets", []):
            name = dataset["path"]
            if name not in group:
                notes.problem(f"level {name} is missing")
                continue
            scale: list[float] = next(
                (t["scale"] for t in dataset.get("coordinateTransformations", []) if "scale" in t), []
            )
            shape = " x ".join(f"{n:,}" for n in group[name].shape)
            notes.add(f"level {name}", f"{shape}, pixel {' x '.join(f'{s:g}' for s in scale)}, {group[name].dtype}")
    return notes.done(path, f"OME-Zarr {ome.get('version', '')} image".replace("  ", " "))


def work(path: Place) -> Description:
    """A folder of unfinished work: what is done, by stage and section.

    Raises:
        InputError: It is not one that deepfere wrote.
    """
    from deepfere.pipeline.workspace import Workspace

    notes, space = Notes(), Workspace(path)
    identity = _json(path / "identity.json", notes).get("identity")
    if not identity and not notes.problems:
        raise InputError(
            "is a folder that deepfere did not write", where=path, remedy="give a file, a store or a result"
        )
    notes.add("identity", identity)
    names = sorted(folder.name for folder in (space.root / "sections").glob("*"))
    notes.add("sections", len(names))
    notes.add("all sections", _stages(path, None, None, notes))
    for name in names:
        notes.add(name, _stages(path, name, space.section(name).journal, notes) or "nothing done yet")
    run = _json(path / "done" / "track.json", notes).get("run_id")
    notes.add("run", run)
    if isinstance(path, Path):
        used = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        notes.add("on disk", f"{used / 2**20:,.1f} MiB")
    results = path / "results"
    finished = bool(names) and all((results / f"{name}.zarr" / "zarr.json").exists() for name in names)
    study = (path / "done").exists() and not path.name.endswith(".work")
    if results.exists():
        notes.add("results", f"{results}: {count_text(sum(1 for _ in results.glob('*.zarr')), 'store')}")
    if not finished:
        notes.problem("unfinished: run the same command again, and it goes on from here")
    return notes.done(path, "folder of a study" if study else "unfinished work of a result")


def _stages(root: Place, section: str | None, journals: Place | None, notes: Notes) -> str:
    out = []
    for stage in STAGES:
        marker = root / "done" / (f"{stage}.json" if section is None else f"{stage}-{section}.json")
        if marker.exists():
            out.append(f"{stage} done in {_json(marker, notes).get('seconds', 0):g} s")
        elif journals is not None and (journals / stage).exists():
            pieces = sum(len(record["units"]) for record in records_in(journals / stage))
            out.append(f"{stage} begun, {count_text(pieces, 'piece')} recorded")
    return ", ".join(out)


def _json(path: Place, notes: Notes) -> dict[str, Any]:
    """The values of a JSON file, none where it is absent; a broken one is a problem."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        notes.problem(f"{path.name} is not JSON ({error})")
        return {}
    return values if isinstance(values, dict) else {}
