"""imzML pairs of any size, written fast and from a seed, for ``benchmarks/ingest.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HEAD = """<?xml version="1.0" encoding="ISO-8859-1"?>
<mzML xmlns="http://psi.hupo.org/ms/mzml" version="1.1">
  <cvList count="1"><cv URI="psi-ms.obo" fullName="PSI-MS" id="MS" version="3.65.0"/></cvList>
  <fileDescription>
    <fileContent>
      <cvParam cvRef="MS" accession="MS:1000579" name="MS1 spectrum" value=""/>
      <cvParam cvRef="IMS" accession="{mode}" name="mode" value=""/>
      <cvParam cvRef="IMS" accession="IMS:1000080" name="universally unique identifier" value="{{{uuid}}}"/>
    </fileContent>
  </fileDescription>
  <referenceableParamGroupList count="4">
    <referenceableParamGroup id="mzArray">
      <cvParam cvRef="MS" accession="MS:1000576" name="no compression" value=""/>
      <cvParam cvRef="MS" accession="MS:1000514" name="m/z array" unitAccession="MS:1000040" unitName="m/z"/>
      <cvParam cvRef="MS" accession="MS:1000523" name="64-bit float" value=""/>
      <cvParam cvRef="IMS" accession="IMS:1000101" name="external data" value="true"/>
    </referenceableParamGroup>
    <referenceableParamGroup id="intensityArray">
      <cvParam cvRef="MS" accession="MS:1000521" name="32-bit float" value=""/>
      <cvParam cvRef="MS" accession="MS:1000515" name="intensity array" unitAccession="MS:1000131"/>
      <cvParam cvRef="MS" accession="MS:1000576" name="no compression" value=""/>
      <cvParam cvRef="IMS" accession="IMS:1000101" name="external data" value="true"/>
    </referenceableParamGroup>
    <referenceableParamGroup id="scan1">
      <cvParam cvRef="MS" accession="MS:1000093" name="increasing m/z scan"/>
    </referenceableParamGroup>
    <referenceableParamGroup id="spectrum1">
      <cvParam cvRef="MS" accession="MS:1000579" name="MS1 spectrum" value=""/>
      <cvParam cvRef="MS" accession="MS:1000511" name="ms level" value="0"/>
      <cvParam cvRef="MS" accession="MS:1000127" name="centroid spectrum" value=""/>
      <cvParam cvRef="MS" accession="MS:1000130" name="positive scan" value=""/>
    </referenceableParamGroup>
  </referenceableParamGroupList>
  <scanSettingsList count="1">
    <scanSettings id="scanSettings1">
      <cvParam cvRef="IMS" accession="IMS:1000042" name="max count of pixels x" value="{nx}"/>
      <cvParam cvRef="IMS" accession="IMS:1000043" name="max count of pixels y" value="{ny}"/>
      <cvParam cvRef="IMS" accession="IMS:1000046" name="pixel size (x)" value="10"/>
      <cvParam cvRef="IMS" accession="IMS:1000047" name="pixel size y" value="10"/>
    </scanSettings>
  </scanSettingsList>
  <instrumentConfigurationList count="1">
    <instrumentConfiguration id="IC1"></instrumentConfiguration>
  </instrumentConfigurationList>
  <run defaultInstrumentConfigurationRef="IC1" id="run">
    <spectrumList count="{n}" defaultDataProcessingRef="export">
"""
TAIL = "    </spectrumList>\n  </run>\n</mzML>\n"
ARRAY = """          <binaryDataArray encodedLength="0">
            <referenceableParamGroupRef ref="{ref}"/>
            <cvParam accession="IMS:1000103" cvRef="IMS" name="external array length" value="%d"/>
            <cvParam accession="IMS:1000104" cvRef="IMS" name="external encoded length" value="%d"/>
            <cvParam accession="IMS:1000102" cvRef="IMS" name="external offset" value="%d"/>
            <binary/>
          </binaryDataArray>
"""
TERMS = (
    ("MS:1000528", "lowest observed m/z", "MS:1000040", "m/z"),
    ("MS:1000527", "highest observed m/z", "MS:1000040", "m/z"),
    ("MS:1000504", "base peak m/z", "MS:1000040", "m/z"),
    ("MS:1000505", "base peak intensity", "MS:1000131", "number of counts"),
    ("MS:1000285", "total ion current", "MS:1000131", "number of counts"),
)
MORE = tuple((f"MS:10020{k:02d}", f"instrument term {k}", "UO:0000028", "millisecond") for k in range(8))


def template(more: bool) -> tuple[str, int]:
    """The text of a spectrum, laid out as pyimzML's writer does, and how many figures it takes besides its place."""
    terms = TERMS + MORE * more
    unit = 'unitCvRef="MS" unitAccession="%s" unitName="%s"'
    line = f'        <cvParam cvRef="MS" accession="%s" name="%s" value="%%r" {unit}/>\n'
    return (
        '      <spectrum defaultArrayLength="0" id="spectrum=%d" index="%d">\n'
        '        <referenceableParamGroupRef ref="spectrum1"/>\n'
        + "".join(line % term for term in terms)
        + '        <scanList count="1">\n'
        '          <cvParam accession="MS:1000795" cvRef="MS" name="no combination"/>\n'
        '          <scan instrumentConfigurationRef="instrumentConfiguration0">\n'
        '            <referenceableParamGroupRef ref="scan1"/>\n'
        '            <cvParam accession="IMS:1000050" cvRef="IMS" name="position x" value="%d"/>\n'
        '            <cvParam accession="IMS:1000051" cvRef="IMS" name="position y" value="%d"/>\n'
        '            <cvParam accession="IMS:1000052" cvRef="IMS" name="position z" value="1"/>\n'
        "          </scan>\n"
        "        </scanList>\n"
        '        <binaryDataArrayList count="2">\n'
        + ARRAY.format(ref="mzArray")
        + ARRAY.format(ref="intensityArray")
        + "        </binaryDataArrayList>\n"
        "      </spectrum>\n"
    ), len(terms)


def write_xml(path: Path, nx: int, lengths: np.ndarray, *, continuous: bool, more: bool = False, seed: int = 0) -> None:
    """The .imzML of spectra of these lengths, in raster order; figures besides their places are invented."""
    rng = np.random.default_rng(seed)
    text, figures = template(more)
    n = len(lengths)
    offset = 16 + (8 * int(lengths[0]) if continuous else 0)
    with path.open("w", encoding="latin-1") as out:
        mode = "IMS:1000030" if continuous else "IMS:1000031"
        out.write(HEAD.format(mode=mode, uuid="0" * 32, nx=nx, ny=-(-n // nx), n=n))
        for first in range(0, n, 10_000):
            part = []
            stated = rng.uniform(100, 1e6, (min(10_000, n - first), figures)).tolist()
            for k, size in enumerate(lengths[first : first + 10_000].tolist(), first):
                y, x = divmod(k, nx)
                mz = 16 if continuous else offset
                values = offset if continuous else offset + 8 * size
                offset = values + 4 * size
                where = (size, 8 * size, mz, size, 4 * size, values)
                part.append(text % (k + 1, k + 1, *stated[k - first], x + 1, y + 1, *where))
            out.write("".join(part))
        out.write(TAIL)


def _image_row(rng: np.random.Generator, nx: int, m: int) -> np.ndarray:
    """(nx, m) float32: noisy, skewed, and zero where there is little, as an instrument's software leaves it."""
    values = rng.standard_gamma(1.0, (nx, m), dtype=np.float32)
    values[values < 0.3] = 0
    return values * 1000


def write_continuous(path: Path, ny: int, nx: int, m: int, seed: int = 0) -> None:
    """A pair whose spectra share one axis."""
    rng = np.random.default_rng(seed)
    write_xml(path, nx, np.full(ny * nx, m), continuous=True, seed=seed)
    with path.with_suffix(".ibd").open("wb") as out:
        out.write(bytes(16) + np.sort(rng.uniform(100, 1000, m)).tobytes())
        for _ in range(ny):
            out.write(_image_row(rng, nx, m).tobytes())


def targets(count: int, seed: int = 0) -> np.ndarray:
    """m/z that `write_processed` puts peaks at."""
    return np.sort(np.random.default_rng(seed).uniform(100, 1000, count))


def write_processed(path: Path, ny: int, nx: int, peaks: int, seed: int = 0) -> None:
    """A pair of centroid spectra of about ``peaks`` peaks each, most of them near `targets`, jittered by 2 ppm."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(int(0.8 * peaks), int(1.2 * peaks) + 1, ny * nx)
    write_xml(path, nx, lengths, continuous=False, seed=seed)
    ions, other = targets(peaks, seed), np.random.default_rng(seed + 1).uniform(100, 1000, peaks)
    every = np.concatenate([ions, other])
    # Nine of ten peaks are ions'; drawn as how early each of them comes, the first of them are the spectrum's.
    late = np.concatenate([np.zeros(peaks), np.full(peaks, 0.75)]).astype(np.float32)
    with path.with_suffix(".ibd").open("wb") as out:
        out.write(bytes(16))
        for y in range(ny):
            here = lengths[y * nx : (y + 1) * nx]
            rank = np.argsort(rng.random((nx, 2 * peaks), dtype=np.float32) + late, axis=1)
            jitter = 1 + 2e-6 * rng.standard_normal((nx, 2 * peaks))
            values = _image_row(rng, nx, 2 * peaks)
            for k, size in enumerate(here.tolist()):
                mz = np.sort(every[rank[k, :size]] * jitter[k, :size])
                out.write(mz.tobytes() + values[k, :size].tobytes())


def write_long(path: Path, ny: int, nx: int, peaks: int, *, continuous: bool, seed: int = 0) -> None:
    """A pair of any number of rows, written as fast as can be: spectra are those of one row, cut to their lengths."""
    rng = np.random.default_rng(seed)
    most = peaks if continuous else int(1.2 * peaks)
    lengths = rng.integers(peaks if continuous else int(0.8 * peaks), most + 1, ny * nx)
    write_xml(path, nx, lengths, continuous=continuous, seed=seed)
    every = np.sort(np.concatenate([targets(peaks, seed), rng.uniform(100, 1000, most - peaks)]))
    mz = np.sort(every * (1 + 2e-6 * rng.standard_normal((nx, most))), axis=1)
    values = _image_row(rng, nx, most)
    with path.with_suffix(".ibd").open("wb") as out:
        out.write(bytes(16) + (mz[0].tobytes() if continuous else b""))
        for y in range(ny):
            here = lengths[y * nx : (y + 1) * nx].tolist()
            if continuous:
                out.write(values.tobytes())
            else:
                out.write(b"".join(part for m, v, n in zip(mz, values, here, strict=True) for part in (m[:n], v[:n])))
