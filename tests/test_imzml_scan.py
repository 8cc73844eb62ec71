"""The scanner finds what the walk finds, or leaves it to the walk: on every layout, and on everything broken."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepfere.errors import InputError
from deepfere.readers import imzml, imzml_scan
from deepfere.readers.imzml import read_index
from deepfere.readers.imzml_scan import Scanner, Unsure, scan

from .realdata import ROOT, real_data

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
FOUND = ("content", "scan_settings", "columns", "dtypes", "compressed", "representations", "polarities")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks even in a small file."""
    monkeypatch.setattr(imzml_scan, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(imzml_scan, "SMALLEST_BYTES", 2048)


def group(name, *terms):
    inner = "".join(f'<cvParam cvRef="MS" accession="{t}" name="n" value=""/>' for t in terms)
    return f'<referenceableParamGroup id="{name}">{inner}</referenceableParamGroup>'


HEAD = (
    '<?xml version="1.0" encoding="{encoding}"?>\n<mzML xmlns="http://psi.hupo.org/ms/mzml" version="1.1">'
    '<fileDescription><fileContent><cvParam cvRef="IMS" accession="IMS:1000031" name="processed" value=""/>'
    "</fileContent></fileDescription><referenceableParamGroupList>{groups}</referenceableParamGroupList>"
    '<scanSettingsList><scanSettings id="s">{note}</scanSettings></scanSettingsList>'
    '<instrumentConfigurationList count="1"><instrumentConfiguration id="i"/></instrumentConfigurationList>'
    '<run id="r"><spectrumList count="1">\n'
)
TAIL = "</spectrumList></run></mzML>\n"


class Layout:
    """How one writer would print spectra."""

    def __init__(self, seed: int, *, groups=True, z=False, indent=True, encoded=True, tight=True, extra=3, floats=True):
        self.rng = random.Random(seed)
        self.groups, self.z, self.indent, self.encoded, self.extra = groups, z, indent, encoded, extra
        self.floats, self.end = floats, "/>" if tight else " />"
        self.order = self.rng.sample(range(4), 4)
        self.terms = self.rng.sample(["IMS:1000102", "IMS:1000103", "IMS:1000104"], 3)
        self.int_first = self.rng.random() < 0.3

    def term(self, accession, value):
        pairs = [("cvRef", accession[:3].strip(":")), ("accession", accession), ("name", "a term"), ("value", value)]
        text = " ".join(f'{pairs[k][0]}="{pairs[k][1]}"' for k in self.order)
        return f"<cvParam {text}{self.end}"

    def array(self, kind, offset, length, size):
        values = {"IMS:1000102": offset, "IMS:1000103": length, "IMS:1000104": size}
        terms = [t for t in self.terms if self.encoded or t != "IMS:1000104"]
        named = {"mz": ("MS:1000514", "MS:1000523"), "int": ("MS:1000515", "MS:1000521")}[kind]
        ref = f'<referenceableParamGroupRef ref="{kind}"{self.end}'
        parts = [ref] if self.groups else [self.term(t, "") for t in named]
        parts += [self.term(t, values[t]) for t in terms] + [f"<binary{self.end}"]
        return ['<binaryDataArray encodedLength="0">', *parts, "</binaryDataArray>"]

    def spectrum(self, number, x, y, length, offset):
        lines = [f'<spectrum id="scan={number + 1}" index="{number}" defaultArrayLength="0">']
        lines.append(self.term("MS:1000127", ""))
        for k in range(self.extra):
            value = self.rng.choice([repr(self.rng.random() * 10 ** self.rng.randint(-9, 9)), "", "a b.c"])
            lines.append(self.term(f"MS:10005{k:02d}", value if self.floats else "1"))
        lines += ["<scanList><scan>", self.term("IMS:1000050", x), self.term("IMS:1000051", y)]
        lines += [self.term("IMS:1000052", 1)] * self.z + ["</scan></scanList>", "<binaryDataArrayList>"]
        arrays = [
            self.array("mz", offset, length, 8 * length),
            self.array("int", offset + 8 * length, length, 4 * length),
        ]
        for array in arrays[::-1] if self.int_first else arrays:
            lines += array
        lines += ["</binaryDataArrayList>", "</spectrum>"]
        return "\n  ".join(lines) + "\n" if self.indent else "".join(lines)

    def spectra(self, n, zero_based=False):
        out, offset = [], 16
        for k in range(n):
            length = self.rng.choice([0, 3, self.rng.randint(1, 20000)])
            where = self.rng.randint(1 - zero_based, 40), self.rng.randint(1 - zero_based, 40)  # repeats and holes
            out.append(self.spectrum(k, *where, length, offset))
            offset += 12 * length
        return out


def document(spectra, groups="", encoding="UTF-8", note=""):
    groups = groups or group("mz", "MS:1000514", "MS:1000523") + group("int", "MS:1000515", "MS:1000521")
    return HEAD.format(encoding=encoding, groups=groups, note=note) + "".join(spectra) + TAIL


def put(folder: Path, text: str | bytes, encoding="utf-8") -> Path:
    path = folder / "a.imzML"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def outcome(find):
    try:
        walk = find()
    except InputError as error:
        return str(error)
    columns = {name: values[:].tolist() for name, values in walk.columns.items()}
    return {name: getattr(walk, name) for name in FOUND} | {"columns": columns}


def same(path, workers=1):
    """Check that the way of `read_index` and the walk of everything agree; what they found."""
    want = outcome(lambda: imzml._walk_all(path))
    assert outcome(lambda: imzml._walk(path)) == want
    if workers > 1 and not isinstance(want, str):
        try:
            assert outcome(lambda: scan(path, None, workers)) == want
        except (Unsure, imzml.expat.ExpatError, LookupError):
            pass
    return want


def fast_rows(path):
    """Spectra that needed no parser."""
    walk = imzml_scan.head.Walk(path)
    scanner = Scanner(walk, None, 1)
    with path.open("rb") as handle:
        scanner.run(handle, False)
    return scanner.fast_rows


layouts = st.builds(
    Layout,
    st.integers(0, 999),
    groups=st.booleans(),
    z=st.booleans(),
    indent=st.booleans(),
    encoded=st.booleans(),
    tight=st.booleans(),
    extra=st.integers(0, 5),
    floats=st.booleans(),
)


@QUICK
@given(
    layouts, st.integers(1, 60), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.sampled_from([1, 2])
)
def test_every_layout_is_scanned_and_agrees(tmp_path, layout, n, zero_based, newline, latin, workers):
    kw = {"encoding": "ISO-8859-1", "note": "<cvParam accession='x' name='5 µm'/>"} if latin else {}
    text = document(layout.spectra(n, zero_based), **kw).replace("\n", newline)
    path = put(tmp_path, text, "latin-1" if latin else "utf-8")
    found = same(path, workers)
    assert isinstance(found, dict) and len(found["columns"]["x"]) == n
    if n > 40:
        assert fast_rows(path) > n // 2


def in_one(spectra, k, change):
    spectra[k] = change(spectra[k])
    return document(spectra)


def around(spectra, k, before, after, n=3):
    spectra[k] = before + spectra[k]
    spectra[k + n] += after
    return document(spectra)


def swap(old, new, count=1):
    return lambda s, k: in_one(s, k, lambda t: t.replace(old, new, count))


ODD = {
    "comment": lambda s, k: in_one(s, k, lambda t: "<!-- a -->" + t),
    "hidden spectra": lambda s, k: around(s, k, "<!-- ", " -->"),
    "many hidden spectra": lambda s, k: around(s, k, "<!-- ", " -->", 30),
    "cdata": lambda s, k: in_one(s, k, lambda t: t.replace("</scan>", "<![CDATA[<spectrum ]]></scan>")),
    "hidden in cdata": lambda s, k: around(s, k, "<note><![CDATA[", "]]></note>"),
    "instruction": lambda s, k: around(s, k, "<?a ", "?>"),
    "entity in a number": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="&#51;"')),
    "entity in a value": swap("a b.c", "a &amp; b"),
    "broken entity": swap("a b.c", "a & b"),
    "markup in a value": swap("a b.c", "a < b"),
    "control character": swap("a b.c", "a \x01 b"),
    "tab in a value": swap("a b.c", "a\tb"),
    "foreign letters": swap("a b.c", "a µ b"),
    "quote in a value": swap("a b.c", "it's"),
    "single quotes": swap('id="scan', "id='scan"),
    "one in single quotes": lambda s, k: in_one(s, k, lambda t: t.replace(f'index="{k}"', f"index='{k}'")),
    "float": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="3.0"')),
    "plus": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="+3"')),
    "underscore": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="0_3"')),
    "blank": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value=" 3"')),
    "leading zero": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="03"')),
    "word": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="three"')),
    "empty": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value=""')),
    "negative": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="-3"')),
    "long": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="1234567890123456"')),
    "beyond 64 bits": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', f'value="{10**30}"')),
    "beyond 64 bits as a number": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="1e300"')),
    "near 64 bits": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', f'value="{2**63 - 8}"')),
    "other length": lambda s, k: in_one(s, k, lambda t: t.replace('value="3"', 'value="4"', 1)),
    "other type": swap("MS:1000521", "MS:1000523"),
    "other group": swap('ref="int"', 'ref="int64"'),
    "no x": swap("IMS:1000050", "IMS:9"),
    "x twice": lambda s, k: in_one(s, k, lambda t: t.replace("</scan>", T.term("IMS:1000050", 77) + "</scan>")),
    "x in all twice": lambda s, k: document([t.replace("</scan>", T.term("IMS:1000050", 77) + "</scan>") for t in s]),
    "two m/z": lambda s, k: in_one(
        s, k, lambda t: t.replace('ref="int"', 'ref="mz"').replace("MS:1000515", "MS:1000514")
    ),
    "other z": lambda s, k: in_one(s, k, lambda t: t.replace("</scan>", T.term("IMS:1000052", 2) + "</scan>")),
    "user param": lambda s, k: in_one(s, k, lambda t: t.replace("</scan>", '<userParam name="a" value="b"/></scan>')),
    "polarity": lambda s, k: in_one(s, k, lambda t: t.replace("</scan>", T.term("MS:1000129", "") + "</scan>")),
    "profile": swap("MS:1000127", "MS:1000128"),
    "inside": lambda s, k: in_one(s, k, lambda t: t.replace("</scan>", T.term("IMS:1000101", "false") + "</scan>")),
    "attribute twice": swap('index="', 'id="" index="'),
    "not closed": swap("</spectrum>", ""),
    "closed twice": swap("</spectrum>", "</spectrum></spectrum>"),
    "cut": lambda s, k: document(s)[: len(document(s)) * k // len(s)],
    "upper case": swap("</spectrum>", "</Spectrum>"),
    "prefix": lambda s, k: in_one(s, k, lambda t: t.replace("<spectrum ", "<m:spectrum ").replace("</sp", "</m:sp")),
    "nested": lambda s, k: in_one(s, k, lambda t: t.replace("</spectrum>", s[0] + "</spectrum>")),
    "all prefixed": lambda s, k: document(
        [t.replace("<spectrum ", "<m:spectrum ").replace("</sp", "</m:sp") for t in s]
    ),
    "new group": lambda s, k: in_one(s, k, lambda t: t + group("int", "MS:1000515", "MS:1000519")),
    "settings between": lambda s, k: in_one(
        s, k, lambda t: t + "<scanSettings>" + T.term("IMS:1000046", 5) + "</scanSettings>"
    ),
    "list again": lambda s, k: document([t + "</spectrumList><spectrumList>" for t in s]),
    "text between": lambda s, k: in_one(s, k, lambda t: t + "words"),
    "quotes in text": lambda s, k: in_one(s, k, lambda t: t + '"" value="3"'),
    "padding": lambda s, k: in_one(s, k, lambda t: t + " " * 20000),
    "group of x": lambda s, k: document(
        s, groups=group("mz", "MS:1000514", "MS:1000523", "IMS:1000050") + group("int", "MS:1000515", "MS:1000521")
    ),
    "two types": lambda s, k: document(
        s, groups=group("mz", "MS:1000514", "MS:1000521", "MS:1000523") + group("int", "MS:1000515", "MS:1000521")
    ),
    "no such group": lambda s, k: document(s, groups=group("mz", "MS:1000514", "MS:1000523")),
    "zlib": lambda s, k: document(
        s, groups=group("mz", "MS:1000514", "MS:1000523", "MS:1000574") + group("int", "MS:1000515", "MS:1000521")
    ),
    "integers": lambda s, k: document(
        s, groups=group("mz", "MS:1000514", "MS:1000523") + group("int", "MS:1000515", "MS:1000519")
    ),
    "document type": lambda s, k: document(s).replace(
        "<mzML", '<!DOCTYPE mzML [<!ATTLIST cvParam value CDATA "5">]><mzML'
    ),
    "hidden head": lambda s, k: document(s).replace("<run ", "<!-- <spectrum > --><run "),
    "utf-16": lambda s, k: document(s, encoding="UTF-16").encode("utf-16"),
    "koi8": lambda s, k: document(s, encoding="KOI8-R"),
    "no such encoding": lambda s, k: document(s, encoding="nonsense"),
    "wrong utf-8": lambda s, k: document(s, note="<a b='µ'/>").encode("latin-1"),
    "no spectra": lambda s, k: document([]),
    "bom": lambda s, k: document(s).encode("utf-8-sig"),
}
T = Layout(0)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", [0, 1, 30, 78])
def test_whatever_is_odd_gives_what_the_walk_gives(tmp_path, name, place):
    for seed in range(3):
        layout = Layout(seed, groups=seed != 1, encoded=seed != 2, indent=seed != 2)
        if name == "other group":
            groups = group("mz", "MS:1000514", "MS:1000523") + group("int", "MS:1000515", "MS:1000521")
            spectra = layout.spectra(80)
            spectra[place] = spectra[place].replace('ref="int"', 'ref="int64"')
            text = document(spectra, groups + group("int64", "MS:1000515", "MS:1000523"))
        else:
            spectra = layout.spectra(80 if "hidden" not in name and name != "instruction" else 120)
            text = ODD[name](spectra, place)
        same(put(tmp_path, text), workers=2 if seed == 0 else 1)


@QUICK
@given(layouts, st.data())
def test_bytes_changed_at_random(tmp_path, layout, data):
    text = bytearray(document(layout.spectra(40)).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at] = data.draw(st.sampled_from([*b'"<>&/=-0123456789aX \n\t!', 0, 7, 200]))
    same(put(tmp_path, bytes(text)))


def test_two_layouts_in_one_file(tmp_path):
    one, two = Layout(1).spectra(60), Layout(2, extra=1).spectra(60)
    path = put(tmp_path, document(one + two + one))
    assert len(same(path)["columns"]["x"]) == 180 and fast_rows(path) > 100
    mixed = [s for pair in zip(one, two, strict=True) for s in pair]
    assert len(same(put(tmp_path, document(mixed)))["columns"]["x"]) == 120


def test_a_file_of_odd_spectra_is_not_tried_for_ever(tmp_path):
    rng = random.Random(1)
    lines = [t.replace("</scan>", "<userParam/>" * rng.randint(0, 9) + "</scan>") for t in Layout(3).spectra(3000)]
    path = put(tmp_path, document(lines))
    assert len(same(path)["columns"]["x"]) == 3000


def test_a_value_that_rarely_differs_costs_one_more_try(tmp_path):
    spectra = Layout(4, floats=False).spectra(200)
    spectra[93] = spectra[93].replace('value="1"', 'value="a much longer value than any other"')
    path = put(tmp_path, document(spectra))
    same(path)
    assert fast_rows(path) >= 195


def agrees_with_pyimzml(path):
    from pyimzml.ImzMLParser import ImzMLParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = ImzMLParser(str(path), ibd_file=None)
    index = read_index(path, check_ibd=False)
    assert [(x, y) for x, y, _ in peer.coordinates] == list(zip(index.x[:], index.y[:], strict=True))
    for ours, its in (
        (index.mz_offset, peer.mzOffsets),
        (index.length, peer.mzLengths),
        (index.int_offset, peer.intensityOffsets),
        (index.length, peer.intensityLengths),
    ):
        np.testing.assert_array_equal(ours, its)


@settings(QUICK, max_examples=20)
@given(st.integers(0, 999), st.booleans(), st.booleans())
def test_generated_files_agree_with_pyimzml(tmp_path, seed, z, zero_based):
    agrees_with_pyimzml(put(tmp_path, document(Layout(seed, z=z).spectra(30, zero_based))))


REAL = [p.relative_to(ROOT).as_posix() for f in ("imzml", "bladder") for p in sorted((ROOT / f).glob("*.imzML"))]


@pytest.mark.real
@pytest.mark.parametrize("name", REAL or ["imzml"])
def test_every_real_file(name):
    path = real_data(name)
    assert isinstance(same(path, 2), dict)
    if path.stem != "imsmicrolink_no_ibd":
        agrees_with_pyimzml(path)
