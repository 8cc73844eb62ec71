"""What a walk of an .imzML found, kept in a Parquet file: the next reading costs no scan.

The file is the walk's columns, and in its metadata what else was found and whose it is: size, time of change and
a digest of head and end of the .imzML. A cache of another file or version, or one that is damaged, is as none.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepfere.errors import InputError
from deepfere.parquet import write_parts
from deepfere.places import Place, UrlPath, reading
from deepfere.readers import imzml_head as head
from deepfere.readers.columns import BLOCK, blocks
from deepfere.readers.ranges import open_binary, size_of

VERSION = 2
KEY = b"deepfere"
DIGESTED_BYTES = 1 << 20
PLAIN = ("content", "scan_settings", "dtypes", "compressed")
SETS = ("representations", "polarities")


def key_of(path: Place) -> dict[str, Any]:
    """What an .imzML is recognised by."""
    sha, size = hashlib.sha256(), size_of(path)
    changed = path.stat().st_mtime_ns if isinstance(path, Path) else None
    with open_binary(path) as handle:
        for at in (0, max(0, size - DIGESTED_BYTES)):
            handle.seek(at)
            sha.update(handle.read(DIGESTED_BYTES))
    return {"version": VERSION, "size": size, "mtime_ns": changed, "sha256": sha.hexdigest()}


def load(path: Place, cache: Place) -> head.Walk | None:
    """The walk that was kept for an .imzML; None where there is none that holds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        walk = head.Walk(path)
        with reading(cache) as file, pq.ParquetFile(file) as table:
            kept = json.loads(table.schema_arrow.metadata[KEY])
            if kept["key"] != key_of(path):
                return None
            for name in PLAIN:
                setattr(walk, name, kept[name])
            names = walk.names()
            for part in table.iter_batches(BLOCK, columns=list(names)):
                for name in names:
                    walk.columns[name].extend(part.column(name).to_numpy())
        for name in SETS:
            setattr(walk, name, set(kept[name]))
        walk.content = _terms(walk.content)
        walk.scan_settings = [_terms(terms) for terms in walk.scan_settings]
        return walk
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError):
        return None


def save(walk: head.Walk, key: dict[str, Any], cache: Place) -> None:
    """Keep a walk, as a whole file; where a folder cannot hold it, nothing is kept."""
    import pyarrow as pa

    kept = {"key": key, **{name: getattr(walk, name) for name in PLAIN}}
    kept |= {name: sorted(getattr(walk, name)) for name in SETS}
    schema = pa.schema([(name, pa.int64()) for name in walk.columns], metadata={KEY: json.dumps(kept)})
    columns = (blocks(values) for values in walk.columns.values())
    parts = (pa.table(list(arrays), schema=schema) for arrays in zip(*columns, strict=True))
    if isinstance(cache, UrlPath):
        write_parts(schema, parts, cache)
        return
    with suppress(OSError, pa.ArrowException, InputError):
        write_parts(schema, parts, cache)


def _terms(kept: Any) -> head.Terms:
    """JSON has no tuples."""
    return {name: (value, unit, term) for name, (value, unit, term) in kept.items()}
