import warnings

import numpy as np
import pytest

import deepfere
from deepfere.errors import InputError
from deepfere.measured.ingest import ingest
from deepfere.readers.imzml import MIXED, msi_digest, read_index
from deepfere.readers.imzml_arrays import read_arrays, read_flat, spectrum

from .imzml_bytes import simple_spectra, write_pair
from .realdata import real_data

UM, NM, MM = "UO:0000017", "UO:0000018", "UO:0000016"


def sizes(x, y=None, unit="", name="pixel size (x)", more=""):
    unit_text = f' unitCvRef="UO" unitAccession="{unit}"' if unit else ""
    text = f'<cvParam accession="IMS:1000046" name="{name}" value="{x}"{unit_text}/>'
    if y is not None:
        text += f'<cvParam accession="IMS:1000047" name="pixel size y" value="{y}"{unit_text}/>'
    return text + more


def extents(count_x, count_y, size_x, size_y):
    return "".join(
        f'<cvParam accession="IMS:10000{n}" name="" value="{v}"/>'
        for n, v in ((42, count_x), (43, count_y), (44, size_x), (45, size_y))
    )


def test_plain_pair(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    index = read_index(path)
    assert len(index) == 6 and index.mode == "processed" and index.representation == "centroid"
    assert index.pitch_um == (20.0, 10.0)  # (y, x)
    assert index.x[:].tolist() == [1, 2, 3, 1, 2, 3] and index.y[:].tolist() == [1, 1, 1, 2, 2, 2]
    assert index.mz_dtype == np.dtype("<f8") and index.int_dtype == np.dtype("<f4")
    assert index.uuid_matches is True and not index.shared_axis
    assert index.mz_offset[0] == 16 and index.int_offset[0] == 40 and index.mz_offset[1] == 52
    whole = np.fromfile(index.ibd_path, np.uint8)
    for ibd in (index.ibd_path.open("rb"), whole):
        mz, intensity = spectrum(index, ibd, 4)
        assert mz.tolist() == [100, 200, 300] and intensity.tolist() == [12, 13, 14]
        assert mz.dtype == np.float64 and intensity.dtype == np.float32


@pytest.mark.parametrize(
    ("term", "code", "dtype"),
    [
        ("MS:1000519", "i", "<i4"),
        ("MS:1000522", "q", "<i8"),
        ("MS:1000523", "d", "<f8"),
        ("IMS:1000141", "i", "<i4"),
        ("IMS:1000142", "q", "<i8"),
        ("IMS:1100000", "b", "|i1"),
        ("IMS:1100001", "h", "<i2"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_number_types_and_zlib(tmp_path, term, code, dtype, compress):
    spectra = [(x, y, mz, [int(v) for v in values]) for x, y, mz, values in simple_spectra()]
    path = write_pair(tmp_path / "a.imzML", spectra, int_type=(term, code), compress=compress)
    index = read_index(path)
    assert index.int_dtype == np.dtype(dtype) and index.int_compressed is compress
    with index.ibd_path.open("rb") as ibd:
        values = read_arrays(index, ibd, np.arange(6)[::-1], "int")
        assert [v.tolist() for v in values] == [s[3] for s in spectra[::-1]]
        assert spectrum(index, ibd, 5)[1].tolist() == spectra[5][3]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("empty", [[1, 2], range(6)])
def test_spectra_without_peaks(tmp_path, compress, empty):
    """Packed, an array of no values still has bytes."""
    spectra = [
        (x, y, [] if n in empty else mz, [] if n in empty else values)
        for n, (x, y, mz, values) in enumerate(simple_spectra())
    ]
    path = write_pair(tmp_path / "a.imzML", spectra, compress=compress)
    index = read_index(path)
    with index.ibd_path.open("rb") as ibd:
        for rows in (np.arange(6), np.array(list(empty))):
            mz, values = read_flat(index, ibd, rows, ("mz", "int"))
            assert mz.tolist() == [v for n in rows for v in spectra[n][2]]
            assert values.tolist() == [v for n in rows for v in spectra[n][3]]


def test_both_polarities_in_one_file_are_refused(tmp_path):
    kind = '<cvParam cvRef="MS" accession="MS:1000127" name="centroid spectrum"/>'
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), spectrum_type=kind)
    text = path.read_text()
    for term in ("MS:1000129", "MS:1000130"):
        text = text.replace("</scan>", f'<cvParam cvRef="MS" accession="{term}" name=""/></scan >', 3)
    path.write_text(text.replace("</scan >", "</scan>"))
    assert read_index(path).polarity == MIXED
    with pytest.raises(InputError, match="both polarities; export each polarity alone"):
        ingest(path, tmp_path / "cube.zarr", mz=[100.0])
    assert not (tmp_path / "cube.zarr").exists()


def test_crlf_latin1_and_misdeclared_encoding(tmp_path):
    for name, kw in {
        "latin": {"encoding": "ISO-8859-1", "newline": "\r\n", "note": "Größe 5 µm"},
        "lie": {"encoding": "ISO-8859-1", "declared": "UTF-8", "note": "5 µm"},
        "bom": {"encoding": "utf-8-sig", "declared": "UTF-8", "note": "5 µm"},
    }.items():
        index = read_index(write_pair(tmp_path / f"{name}.imzML", simple_spectra(), **kw))
        assert len(index) == 6 and index.pitch_um == (20.0, 10.0)


def test_two_types_are_settled_by_the_byte_count(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), mz_type=("MS:1000521+MS:1000523", "d"))
    assert read_index(path).mz_dtype == np.dtype("<f8")
    path.write_text(path.read_text().replace('name="external encoded length" value="24"', 'value="0"'))
    with pytest.raises(InputError, match="several number types"):
        read_index(path)


@pytest.mark.parametrize(
    ("settings", "pitch"),
    [
        ([sizes(4406.25, 4406.25, NM)], (4.40625, 4.40625)),
        ([sizes(0.05, 0.1, MM)], (100.0, 50.0)),
        ([sizes(30, 20, UM)], (20.0, 30.0)),
        ([sizes(30, 20)], (20.0, 30.0)),
        ([sizes(30)], (30.0, 30.0)),
        ([sizes(30, name="pixel size", more=extents(10, 5, 300, 150))], (30.0, 30.0)),
        ([sizes(30, 30), sizes(30, 30)], (30.0, 30.0)),
        ([sizes(30, 30), extents(2, 2, 9, 9)], (30.0, 30.0)),
    ],
)
def test_pitch_and_units(tmp_path, settings, pitch):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), scan_settings=settings)
    assert read_index(path).pitch_um == pytest.approx(pitch)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ([extents(2, 2, 9, 9)], "no pixel size"),
        ([sizes(10, 10), sizes(25, 25)], "contradict each other .*10 x 10 um and 25 x 25 um"),
        ([sizes(30, name="pixel size", more=extents(65, 3, 356, 16))], "may be an area"),
        ([sizes(30, name="pixel size")], "length or an area"),
        ([sizes(0, 0)], "not a positive length"),
        ([sizes(10, 10, "UO:0000010")], "not a length"),
        ([sizes("ten", 10)], "not a number"),
        ([sizes(5e7, 5e7)], "5e.07 x 5e.07 um .x, y., which cannot be meant"),
        ([sizes(10, 5e-5)], "cannot be meant"),
    ],
)
def test_pitch_that_is_not_believed(tmp_path, settings, why):
    import re

    index = read_index(write_pair(tmp_path / "a.imzML", simple_spectra(), scan_settings=settings))
    assert index.pitch_um is None and re.search(why, index.pitch_problem)


def test_ibd_found_whatever_its_case(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), ibd_name="a.IBD")
    assert read_index(path).ibd_path.name == "a.IBD"


def test_missing_and_truncated_ibd(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    ibd = path.with_suffix(".ibd")
    data = ibd.read_bytes()
    ibd.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"spectrum 6 of 6 .* {len(data)} bytes needed, {len(data) - 1} pres"):
        read_index(path)
    ibd.write_bytes(data[:60])
    with pytest.raises(InputError, match="spectrum 2 of 6"):
        read_index(path)
    ibd.unlink()
    with pytest.raises(InputError, match=r"a\.ibd is missing; put it beside"):
        read_index(path)


def test_uuid_mismatch_warns(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), uuid=bytes(16))
    with pytest.warns(UserWarning, match="belong together"):
        index = read_index(path)
    assert index.uuid_matches is False


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t[: len(t) // 2], "not well-formed XML"),
        (lambda t: "<html></html>", "root is <html>"),
        (lambda t: "garbage", "not well-formed XML"),
        (lambda t: t.replace("IMS:1000031", "IMS:1"), "neither continuous nor processed"),
        (lambda t: t.replace('accession="IMS:1000050"', 'accession="IMS:9"'), "spectrum 1 has no position x"),
        (lambda t: t.replace('name="position x" value="2"', 'value="two"'), "'two', not a whole number"),
        (lambda t: t.replace('accession="IMS:1000102"', 'accession="IMS:9"'), "no external offset"),
        (lambda t: t.replace("MS:1000515", "MS:9"), "no intensity array"),
        (lambda t: t.replace("MS:1000521", "MS:9"), "states no number type"),
        (lambda t: t.replace("MS:1000576", "MS:1002312"), "compressed with"),
        (lambda t: t.replace('length" value="3"', 'length" value="4"', 1), "do not fit the type"),
        (lambda t: t.replace('offset" value="16"', 'offset" value="-16"', 1), "negative offset"),
    ],
)
def test_broken_xml_is_one_clear_line(tmp_path, change, why):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=why) as caught:
        read_index(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and caught.value.remedy


def test_no_spectra_and_other_files(tmp_path):
    path = write_pair(tmp_path / "a.imzML", [])
    with pytest.raises(InputError, match="no spectra"):
        read_index(path)
    with pytest.raises(InputError, match=r"give the \.imzML"):
        read_index(path.with_suffix(".ibd"))
    with pytest.raises(InputError, match="cannot be read"):
        read_index(tmp_path / "absent.imzML")


def test_broken_zlib_stream_is_named(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra(), compress=True)
    index = read_index(path)
    data = bytearray(index.ibd_path.read_bytes())
    data[int(index.int_offset[2]) + 3] ^= 255
    with pytest.raises(InputError, match="spectrum 3 is not a valid zlib stream"):
        spectrum(index, bytes(data), 2)


def test_several_sections_are_refused(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    text = path.read_text()
    for z in ("1", "2"):
        text = text.replace("</scan>", f'<cvParam accession="IMS:1000052" name="" value="{z}"/></Scan>', 1)
    path.write_text(text.replace("</Scan>", "</scan>"))
    with pytest.raises(InputError, match="several sections"):
        read_index(path)


def test_digest_follows_both_files(tmp_path):
    path = write_pair(tmp_path / "a.imzML", simple_spectra())
    before = msi_digest(path)
    assert before == msi_digest(path) and len(before) == 64
    ibd = path.with_suffix(".ibd")
    ibd.write_bytes(ibd.read_bytes()[:-1] + b"x")
    assert msi_digest(path) != before


# What becomes of every file: pitch (y, x) or part of the reason why there is none; None for refused at once.
REAL = {
    "Example_Continuous": (100.0, 100.0),
    "Example_Processed": (100.0, 100.0),
    "MatrixTests_N2": "states no pixel size",
    "Untreated_3_434_tiny": "states no pixel size",
    "imsmicrolink_no_ibd": None,
    "iontof_sparse": (4.40625, 4.40625),
    "msbackend_test_image": "may be an area",
    "pym2aia_test": (20.0, 20.0),
    "simple_imzml": (20.0, 20.0),
    "two_precision_terms": (10.0, 10.0),
    "two_scansettings": "contradict each other",
    "unit_nanometre": (4.40625, 4.40625),
}


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_files_agree_with_pyimzml(name):
    from pyimzml.ImzMLParser import ImzMLParser

    path, expected = real_data("imzml", f"{name}.imzML"), REAL[name]
    if expected is None:
        with pytest.raises(InputError, match=r"imsmicrolink_no_ibd\.ibd is missing"):
            read_index(path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index, peer = read_index(path), ImzMLParser(str(path))
    if isinstance(expected, str):
        assert index.pitch_um is None and expected in index.pitch_problem
    else:
        assert index.pitch_um == pytest.approx(expected)
    assert [(x, y) for x, y, _ in peer.coordinates] == list(zip(index.x[:], index.y[:], strict=True))
    assert index.polarity == peer.polarity
    with index.ibd_path.open("rb") as ibd:
        many = read_arrays(index, ibd, np.arange(len(index)), "int")
        for i in range(len(index)):
            mz, intensity = spectrum(index, ibd, i)
            peer_mz, peer_intensity = peer.getspectrum(i)
            np.testing.assert_array_equal(mz, peer_mz)
            np.testing.assert_array_equal(intensity, peer_intensity)
            np.testing.assert_array_equal(many[i], peer_intensity)


@pytest.mark.real
def test_every_real_file_is_listed():
    assert {p.stem for p in real_data("imzml").glob("*.imzML")} == set(REAL)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "mz_type", [("MS:1000521", "f"), ("MS:1000523", "d"), ("MS:1000519", "i"), ("MS:1000522", "q")]
)
@pytest.mark.parametrize(
    "int_type", [("MS:1000521", "f"), ("MS:1000523", "d"), ("MS:1000519", "i"), ("MS:1000522", "q")]
)
def test_every_number_type_is_read(tmp_path, mz_type, int_type, compress):
    spectra = [(x, y, [100 + y, 250, 731], [x + 1, 7, 10 * y + 3]) for y in (1, 2) for x in (1, 2, 3)]
    path = write_pair(tmp_path / "a.imzML", spectra, mz_type=mz_type, int_type=int_type, compress=compress)
    raw, stored = deepfere.open_measured(path), ingest(path, tmp_path / "m.zarr", mz=[101.0, 102.0, 250.0, 731.0])
    for k, (x, y, mz, intensity) in enumerate(spectra):
        for found in (raw.spectrum(y - 1, x - 1), spectrum(read_index(path), path.with_suffix(".ibd").read_bytes(), k)):
            assert found[0].dtype == np.float64 and found[0].tolist() == mz and found[1].tolist() == intensity
        assert stored.cube()[:, y - 1, x - 1].tolist() == [*[(x + 1) * (y == n) for n in (1, 2)], 7, 10 * y + 3]
