"""Scans the spectra of an .imzML as bytes, many at a time; the result is `imzml_head.Walk`'s, or the walk does it.

Writers print every spectrum of a file from one template, in which little more than numbers changes. The template
is learnt from the file, and every byte of every spectrum is compared with it, so nothing is assumed: fixed text must
be the template's, a value ends at the next quote, and values that count must be digits. Text that differs in another
way goes, in its turn, through the XML parser and the walk, which also see the head, one spectrum of each template,
and the end of the file: XML without some whole elements is well formed, or not, as it was with them. Errors of any
kind are worded by a walk of the whole file.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np
from numpy.typing import NDArray

from deepfere.places import Place
from deepfere.readers import imzml_head as head
from deepfere.readers.ranges import open_binary

BLOCK_BYTES = 4 << 20  # what is read is compared while it is in the processor's cache
SMALLEST_BYTES = 64 << 10
SAMPLES, RETRIES, MAX_DIGITS = 8, 8, 15
START = b"<spectrum "
# In these a byte below 128 is that character of ASCII, and no part of another.
ENCODINGS = ("utf-8", "us-ascii", "ascii", "iso-8859-1", "latin-1", "windows-1252")
ARRAY_TERMS = {head.OFFSET: "offset", head.LENGTH: "length", head.ENCODED: "encoded"}
PLACE_TERMS = {head.POSITION_X: "x", head.POSITION_Y: "y"}
NEEDED = {"x", "y", "mz_offset", "mz_length", "int_offset", "int_length"}

_TAG = re.compile(rb"<(/?)([A-Za-z][\w.-]*)((?:\s+[A-Za-z_][\w.:-]*=\"[^\"<&\x00-\x1f]*\")*)\s*(/?)>")
_ATTRIBUTE = re.compile(rb"([A-Za-z_][\w.:-]*)=\"([^\"]*)\"")
_HIDDEN = re.compile(rb"<!--.*?-->|<!\[CDATA\[.*?\]\]>|<\?.*?\?>", re.DOTALL)
_EDGE = re.compile(rb"<(/?)(?:[\w.-]+:)?spectrum[\s/>]")
_ELSEWHERE = re.compile(rb"<[!?]|<(?:[\w.-]+:)?(?:referenceableParamGroup|fileContent|scanSettings)[\s/>]")
_SINKS = {b"referenceableParamGroup", b"fileContent", b"scanSettings"}

Numbers = dict[str, NDArray[np.int64]]
Types = dict[str, tuple[str, ...]]
Found = tuple[Numbers | None, int]


class Unsure(Exception):
    """The file is none that the scanner knows how to take apart: the walk of all of it decides."""


class Template:
    """What the text of spectra looks like.

    Args:
        sample: One spectrum, from its tag to the next one's.
        free: Which attribute values may differ, by their number in the text -> the longest that was seen.
        loose: All those to which the walk pays no heed, and the wanted ones: these may be made free.
        wanted: Column ("x", "y", "mz_offset", "mz_encoded"...) -> number of its value.
        dtypes: Kind of array -> the number types that it states.
    """

    def __init__(
        self, sample: bytes, free: dict[int, int], loose: set[int], wanted: dict[str, int], dtypes: Types
    ) -> None:
        self.sample, self.free, self.loose, self.wanted, self.dtypes = sample, free, loose, wanted, dtypes
        parts, numbers = sample.split(b'"'), sorted(free)
        edges = [0, *[edge for k in numbers for edge in (2 * k + 1, 2 * k + 2)], len(parts)]
        # Fixed text from the closing quote of one free value to the opening quote of the next.
        texts = [b'"'.join(parts[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        texts = [b'"' * (k > 0) + t + b'"' * (k < len(numbers)) for k, t in enumerate(texts)]
        self.texts = [np.frombuffer(t, np.uint8) for t in texts]
        self.least = max(1, sum(map(len, texts)))
        names = {number: name for name, number in wanted.items()}
        self.values = [(names.get(k, ""), MAX_DIGITS + 1 if k in names else free[k] + 8) for k in numbers]

    def widened(self, other: bytes) -> Template | None:
        """With those values free in which another spectrum differs; None if it differs in anything else."""
        mine, its = self.sample.split(b'"'), other.split(b'"')
        if len(mine) != len(its):
            return None
        differ = [k for k, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b]
        if any(k % 2 == 0 or k // 2 not in self.loose for k in differ):
            return None
        longest = {k // 2: max(len(mine[k]), len(its[k])) for k in differ}
        free = self.free | {k: max(size, self.free.get(k, 0)) for k, size in longest.items()}
        return Template(self.sample, free, self.loose, self.wanted, self.dtypes)

    def match(self, text: bytearray, a: int, b: int) -> Found:
        """The wanted numbers of every spectrum in ``text[a:b]``; else None and where one begins that differs."""
        starts = [a]
        while (found := text.find(START, starts[-1] + self.least, b)) > 0:
            starts.append(found)
        every, begin = np.frombuffer(text, np.uint8), np.array(starts)
        at = begin
        out: Numbers = {}
        for k, expected in enumerate(self.texts):
            if int(at.max()) + len(expected) > b:
                return None, starts[int(at.argmax())]
            equal = _cut(every, at, len(expected)) == expected
            if not equal.all():
                return None, starts[int(equal.all(axis=1).argmin())]
            at = at + len(expected)
            if k == len(self.values):
                break
            name, width = self.values[k]
            if int(at.max()) + width > len(text):
                return None, starts[int(at.argmax())]
            value = _cut(every, at, width)
            if name:
                digits = value - np.uint8(ord("0"))  # what comes before "0" wraps to above 9
                size = (digits > 9).argmax(axis=1)
                if not size.all():
                    return None, starts[int(size.argmin())]
                out[name] = _number(digits, size)
            else:
                # A value ends where there is a quote, and must not hold what would be markup or unclear.
                stop = (value == 34) | (value == 38) | (value == 60) | (value.view(np.int8) < 32)
                size = stop.argmax(axis=1)
            at = at + size  # of no end in sight it is 0, and then the text that follows differs
        astray = at != np.append(begin[1:], b)
        return (None, starts[int(astray.argmax())]) if astray.any() else (out, -1)


def _cut(text: NDArray[np.uint8], at: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """The ``size`` bytes at each place, (n, size): one copy of memory per place, not one per byte."""
    everywhere = np.ndarray((len(text) - size + 1,), f"V{size}", text.data, strides=(1,))
    return everywhere[at].view(np.uint8).reshape(len(at), size)


def _number(digits: NDArray[np.uint8], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole numbers from the first ``size`` digits of each row."""
    least = int(size.min())
    out = digits[:, 0].astype(np.int64)
    for k in range(1, int(size.max())):
        longer = out * 10 + digits[:, k]
        out = longer if k < least else np.where(k < size, longer, out)
    return out


def learn(samples: list[bytes], walk: head.Walk) -> Template | None:
    """The template of some spectra, the first of which the walk has kept; None where they have none in common."""
    sample = samples[0]
    if b"'" in sample or b"&" in sample:
        return None
    wanted: dict[str, int] = {}
    dtypes: Types = {}
    loose: set[int] = set()
    terms: head.Terms = {}
    places: dict[str, int] = {}
    ends, closed, inside = 0, False, False
    for found in _TAG.finditer(sample):
        between = sample[ends : found.start()]
        ends = found.end()
        closing, tag, text, empty = found.groups()
        nested = tag == b"spectrum" and not closing and found.start() > 0
        if b'"' in between or b"<" in between or closed or nested or tag in _SINKS:
            return None
        closed = bool(closing) and tag == b"spectrum"
        if tag == b"binaryDataArray":
            if inside != bool(closing) or empty:
                return None
            if inside:
                kind, dtypes_here = walk.describe(terms)
                if kind:
                    dtypes[kind] = dtypes_here
                    wanted |= {f"{kind}_{ARRAY_TERMS[a]}": k for a, k in places.items() if a in ARRAY_TERMS}
            inside, terms, places = not inside, {}, {}
        number = sample.count(b'"', 0, found.start(3)) // 2
        attributes = _ATTRIBUTE.findall(text)
        values = {key: value.decode("latin-1") for key, value in attributes}
        if tag == b"cvParam":
            accession = values.get(b"accession", "")
            terms[accession] = ("", "", "")
            for k, (key, _) in enumerate(attributes, number):
                if key == b"value" and accession not in (head.POSITION_Z, head.EXTERNAL):
                    loose.add(k)
                    if inside:
                        places[accession] = k
                    elif accession in PLACE_TERMS:
                        wanted[PLACE_TERMS[accession]] = k
        elif tag == b"referenceableParamGroupRef":
            group = walk.group(values.get(b"ref", ""))
            if group.keys() & {*ARRAY_TERMS, *PLACE_TERMS}:
                return None
            terms.update(group)
        else:
            loose.update(range(number, number + len(attributes)))
    if not closed or sample[ends:].strip() or not wanted.keys() >= NEEDED:
        return None
    template: Template | None = Template(sample, dict.fromkeys(wanted.values(), 0), loose, wanted, dtypes)
    for other in samples[1:]:
        template = template and template.widened(other)
    return template


class Scanner:
    """One scan; see `scan`."""

    def __init__(self, walk: head.Walk, encoding: str | None, workers: int) -> None:
        self.walk, self.workers = walk, workers
        self.parser = walk.parser(encoding)
        self.encoding: str | None = None
        self.parser.XmlDeclHandler = lambda version, encoding, alone: setattr(self, "encoding", encoding)
        self.template: Template | None = None
        self.blind = False  # the rest is the parser's: something was met behind which spectra may be hidden
        self.fast_rows = self.slow_rows = 0

    def run(self, handle: IO[bytes], override: bool) -> None:
        """Scan an .imzML."""
        # One for the whole file (fresh memory costs as much as the comparison): what is new, and what was left over.
        text = bytearray(2 * self.workers * BLOCK_BYTES)
        size = _fill(handle, text, 0)
        first = text.find(START, 0, size)
        # None in what was read; a comment that is open where it seems to be; a document type with its own rules.
        if first < 0 or re.search(rb"<[!?]", _HIDDEN.sub(b"", text[:first])):
            raise Unsure
        self.parser.Parse(text[:first])
        if not override and self.encoding is not None and self.encoding.lower() not in ENCODINGS:
            raise Unsure
        with ThreadPoolExecutor(self.workers) as pool:
            while True:
                cut = text.rfind(START, first, size)
                self._blocks(text, first, cut, pool if self.workers > 1 else None)
                if size - cut > len(text) // 2:
                    raise Unsure
                text[: size - cut] = text[cut:size]
                first, kept = 0, size - cut
                size = _fill(handle, text, kept)
                if size == kept:
                    break
        self.parser.Parse(text[:size], True)

    def _blocks(self, text: bytearray, begin: int, end: int, pool: ThreadPoolExecutor | None) -> None:
        """Whole spectra: those that look like the template side by side, the others one after the other."""
        edges = [begin]
        while (last := edges[-1]) < end:
            cut = text.rfind(START, last + 1, min(end, last + BLOCK_BYTES) + len(START))
            edges.append(cut if cut > 0 else text.find(START, last + 1, end + len(START)))
        parts = deque(itertools.pairwise(edges))
        waiting: deque[Future[Found]] = deque()
        template = self.template
        if pool is not None and template is not None and not self.blind:
            waiting.extend(pool.submit(template.match, text, a, b) for a, b in parts)
        for a, b in parts:
            found = waiting.popleft().result() if waiting else None
            self._block(text, a, b, found if template is self.template else None)

    def _block(self, text: bytearray, a: int, b: int, found: Found | None) -> None:
        todo = [(a, b)]
        while todo:
            a, b = todo.pop()
            a = self._fast(text, a, b, found)
            found = None
            middle = text.find(START, (a + b) // 2, b)
            if b - a > SMALLEST_BYTES and middle > a and not self.blind:
                todo += [(middle, b), (a, middle)]
            elif a < b:
                self._slow(bytes(text[a:b]))

    def _fast(self, text: bytearray, a: int, b: int, found: Found | None) -> int:
        """Keep what can be kept without the parser; where the rest begins."""
        fresh = False
        for _ in range(RETRIES):
            if self.blind or a == b:
                break
            if self.template is None:
                starts = [text.find(START, a + k * (b - a) // SAMPLES, b) for k in range(SAMPLES)]
                ends = [text.find(START, s + 1, b) for s in starts]
                samples = [bytes(text[s : e if e > 0 else b]) for s, e in zip(starts, ends, strict=True) if s >= 0]
                self._slow(samples[0])
                a += len(samples[0])
                self.template = None if self.blind else learn(samples, self.walk)
                fresh = True
                if self.template is None:
                    break
                continue
            numbers, wrong = found or self.template.match(text, a, b)
            found = None
            if numbers is not None:
                return b if self._keep(numbers, self.template) else a
            last = text.find(START, wrong + 1, b)
            wider = self.template.widened(bytes(text[wrong : last if last > 0 else b]))
            if (wider is None and fresh) or (wider and wider.free == self.template.free):
                break
            self.template = wider
        return a

    def _keep(self, numbers: Numbers, template: Template) -> bool:
        """Take the numbers if they are such as the walk takes without a second look."""
        rows = {"x": numbers["x"], "y": numbers["y"]}
        for kind in ("mz", "int"):
            length, packed = numbers[f"{kind}_length"], self.walk.compressed[kind]
            encoded = np.broadcast_to(numbers.get(f"{kind}_encoded", np.int64(0)), length.shape)
            itemsizes = [np.dtype(d).itemsize for d in template.dtypes[kind]]
            size = np.dtype(self.walk.dtypes[kind]).itemsize
            unstated = bool(((encoded == 0) & (length > 0)).any())
            other = bool(((encoded != length * size) & (encoded > 0) & (length > 0)).any())
            if len(itemsizes) > 1 and (unstated or packed or itemsizes.count(size) != 1):
                return False
            if unstated if packed else other:
                return False
            rows[f"{kind}_bytes"] = encoded
            rows[f"{kind}_offset"], rows["length"] = numbers[f"{kind}_offset"], length
        if (numbers["mz_length"] != numbers["int_length"]).any():
            return False
        for name in self.walk.names():
            self.walk.columns[name].extend(rows[name])
        self.fast_rows += len(rows["x"])
        return True

    def _slow(self, text: bytes) -> None:
        """Have the parser and the walk do it."""
        if not self.blind:
            edges = [found.group(1) for found in _EDGE.finditer(text)]
            whole = edges == [b"", b"/"] * (len(edges) // 2)
            self.slow_rows += len(edges) // 2
            many = self.slow_rows > 1000 and self.slow_rows > self.fast_rows
            self.blind = not whole or many or _ELSEWHERE.search(text) is not None
        before = len(self.walk)
        self.parser.Parse(text)
        if not self.blind and len(self.walk) != before + len(edges) // 2:
            self.blind = True


def _fill(handle: IO[bytes], text: bytearray, size: int) -> int:
    """Read on into a text of which ``size`` bytes are there; how many are now."""
    with memoryview(text) as view:
        wanted = size + len(text) // 2
        while size < wanted and (more := handle.readinto(view[size:wanted])):  # type: ignore[attr-defined]
            size += more
    return size


def scan(path: Place, encoding: str | None = None, workers: int = 1) -> head.Walk:
    """What `Walk.run` finds in an .imzML, found faster.

    Args:
        path: The .imzML, or its URL.
        encoding: Overrides what the XML declares.
        workers: Threads that compare blocks of text.

    Raises:
        Unsure: It is not laid out as expected. What the walk raises is raised, too.
    """
    walk = head.Walk(path)
    with open_binary(path) as handle:
        Scanner(walk, encoding, workers).run(handle, encoding is not None)
    return walk
