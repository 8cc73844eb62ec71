"""imzML pairs written byte by byte: a writer that shares nothing with the reader under test."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

UUID = bytes(range(16))


def array_xml(kind, ref, offset, length, size):
    return (
        f'<binaryDataArray encodedLength="0"><referenceableParamGroupRef ref="{ref}"/>'
        f'<cvParam cvRef="IMS" accession="IMS:1000103" name="external array length" value="{length}"/>'
        f'<cvParam cvRef="IMS" accession="IMS:1000104" name="external encoded length" value="{size}"/>'
        f'<cvParam cvRef="IMS" accession="IMS:1000102" name="external offset" value="{offset}"/>'
        "<binary/></binaryDataArray>"
    )


def write_pair(
    path: Path,
    spectra,
    *,
    mode="processed",
    spectrum_type='<cvParam cvRef="MS" accession="MS:1000127" name="centroid spectrum"/>',
    settings='<cvParam cvRef="IMS" accession="IMS:1000046" name="pixel size (x)" value="10"/>'
    '<cvParam cvRef="IMS" accession="IMS:1000047" name="pixel size y" value="20"/>',
    scan_settings=None,
    mz_type=("MS:1000523", "d"),
    int_type=("MS:1000521", "f"),
    compress=False,
    encoding="UTF-8",
    declared=None,
    newline="\n",
    uuid=UUID,
    ibd_name=None,
    note="",
):
    """Write spectra [(x, y, mz, intensity), ...]; in continuous mode the first m/z array is everyone's."""
    ibd = bytearray(uuid)

    def put(values, code):
        raw = struct.pack(f"<{len(values)}{code}", *values)
        raw = zlib.compress(raw) if compress else raw
        ibd.extend(raw)
        return len(ibd) - len(raw), len(values), len(raw)

    body, shared = [], None
    for x, y, mz, intensity in spectra:
        if mode == "continuous":
            shared = shared or put(mz, mz_type[1])
            where_mz = shared
        else:
            where_mz = put(mz, mz_type[1])
        where_int = put(intensity, int_type[1])
        body.append(
            f'<spectrum id="s" index="0" defaultArrayLength="0">{spectrum_type}<scanList count="1"><scan>'
            f'<cvParam cvRef="IMS" accession="IMS:1000050" name="position x" value="{x}"/>'
            f'<cvParam cvRef="IMS" accession="IMS:1000051" name="position y" value="{y}"/>'
            '</scan></scanList><binaryDataArrayList count="2">'
            + array_xml("mz", "mzArray", *where_mz)
            + array_xml("int", "intensityArray", *where_int)
            + "</binaryDataArrayList></spectrum>"
        )
    compression = "MS:1000574" if compress else "MS:1000576"
    mode_term = {"continuous": "IMS:1000030", "processed": "IMS:1000031"}[mode]
    scans = scan_settings or [settings]
    lines = [
        f'<?xml version="1.0" encoding="{declared or encoding}"?>',
        '<mzML xmlns="http://psi.hupo.org/ms/mzml" version="1.1">',
        "<fileDescription><fileContent>",
        f'<cvParam cvRef="IMS" accession="{mode_term}" name="{mode}"/>',
        f'<cvParam cvRef="IMS" accession="IMS:1000080" name="universally unique identifier" '
        f'value="{{{UUID.hex().upper()}}}"/>',
        "</fileContent></fileDescription>",
        f'<sampleList count="1"><sample id="a" name="{note}"/></sampleList>',
        '<referenceableParamGroupList count="2">',
    ]
    for name, term, kind in (
        ("mzArray", "MS:1000514", mz_type[0]),
        ("intensityArray", "MS:1000515", int_type[0]),
    ):
        lines.append(f'<referenceableParamGroup id="{name}">')
        lines += [f'<cvParam accession="{a}" name=""/>' for a in (term, *kind.split("+"), compression)]
        lines.append("</referenceableParamGroup>")
    lines += ["</referenceableParamGroupList>", "<scanSettingsList>"]
    lines += [f'<scanSettings id="q{k}">{s}</scanSettings>' for k, s in enumerate(scans)]
    lines += ["</scanSettingsList>", f'<run id="r"><spectrumList count="{len(body)}">', *body]
    lines += ["</spectrumList></run></mzML>"]
    path.write_bytes(newline.join(lines).encode(encoding))
    path.with_name(ibd_name or path.with_suffix(".ibd").name).write_bytes(bytes(ibd))
    return path


def simple_spectra(ny=2, nx=3, mz=(100.0, 200.0, 300.0), first=1):
    return [
        (x + first, y + first, list(mz), [float(10 * y + x + k + 1) for k in range(len(mz))])
        for y in range(ny)
        for x in range(nx)
    ]
