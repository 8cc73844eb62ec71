"""Slides by URL: digests, `info`, `fuse` and studies, from a server of the S3 protocol and a plain web server."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile

import deepfere
from deepfere import remote
from deepfere.errors import InputError, StorageError
from deepfere.inspect import describe
from deepfere.readers.digest import content_digest
from deepfere.readers.ranges import RangeStream, open_ranges
from deepfere.readers.slide import open_slide

from .test_reader_tiff import picture

SLIDE = "s3://bucket/slides/section.tif"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def uploaded(s3_session, phantom):
    s3_session.files.put(str(phantom.slide), SLIDE)
    return SLIDE


class Server(http.server.BaseHTTPRequestHandler):
    """One file by byte ranges; ``plan`` holds what to answer to the next requests in its place."""

    def __init__(self, data, plan, *args):
        self.data, self.plan = data, plan
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        data, wanted = self.data, self.headers.get("Range")
        order = self.plan.pop(0) if self.plan else "serve"
        if isinstance(order, int):
            self.send_response(order)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, last = 0, len(data) - 1
        if wanted and order != "whole":
            a, b = wanted.removeprefix("bytes=").split("-")
            first, last = int(a), min(int(b or last), last)
        self.send_response(206 if wanted and order != "whole" else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if body:
            part = data[first : last + 1]
            self.wfile.write(part[: len(part) // 2] if order == "half" else part)
            self.close_connection = order == "half"

    def log_message(self, *args):
        pass


@pytest.fixture
def web():
    """Serve a file by HTTP: its URL, and the list of what to answer instead."""
    servers = []

    def start(path):
        plan = []
        handler = functools.partial(Server, path.read_bytes(), plan)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/{path.name}", plan

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    return True


def test_digest_is_that_of_the_local_file(s3, uploaded, phantom, web, tmp_path, monkeypatch):
    import deepfere.readers.digest as module

    assert content_digest(uploaded) == content_digest(phantom.slide)
    assert content_digest(web(phantom.slide)[0]) == content_digest(phantom.slide)
    monkeypatch.setattr(module, "WHOLE_BELOW_BYTES", 1000)
    monkeypatch.setattr(module, "MIB", 300)
    assert content_digest(uploaded) == content_digest(phantom.slide) != hashlib.sha256(phantom.slide.read_bytes())
    # Another file at that address is seen at once, listings that the client kept or not.
    s3.files.pipe("s3://bucket/other.tif", b"a" * 2000)
    before = content_digest("s3://bucket/other.tif")
    s3.files.pipe("s3://bucket/other.tif", b"a" * 1999 + b"b")
    assert content_digest("s3://bucket/other.tif") != before


def test_stream_over_ranges(web, tmp_path, monkeypatch):
    import deepfere.readers.ranges as module

    monkeypatch.setattr(module, "STREAM_BYTES", 64)
    monkeypatch.setattr(module, "STREAM_KEPT", 3)
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (tmp_path / "f").write_bytes(data)
    stream = RangeStream(open_ranges(web(tmp_path / "f")[0]))
    rng = np.random.default_rng(1)
    for _ in range(30):
        at, count = int(rng.integers(0, 1010)), int(rng.integers(0, 400))
        stream.seek(at)
        assert stream.read(count) == data[at : at + count] and len(stream._kept) <= 3
    assert stream.seek(-10, 2) == 990 and stream.read() == data[-10:]


def test_pixels_of_other_tiffs_and_pictures(s3, tmp_path):
    from PIL import Image

    image = picture(300, 400)
    for name, how in {
        "deflate.tif": {"tile": (64, 64), "compression": "deflate"},
        "planar.tif": {"tile": (64, 64), "planarconfig": "separate", "compression": "deflate"},
        "strips.tif": {"rowsperstrip": 16, "compression": "lzw"},
    }.items():
        stored = image.transpose(2, 0, 1) if "planar" in name else image
        tags = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "metadata": None}
        tifffile.imwrite(tmp_path / name, stored, photometric="rgb", **tags, **how)
    Image.fromarray(image).save(tmp_path / "p.png")
    for name in ("deflate.tif", "planar.tif", "strips.tif", "p.png"):
        s3.files.put(str(tmp_path / name), f"s3://bucket/{name}")
        slide = open_slide(f"s3://bucket/{name}", 0.5 if name == "p.png" else None)
        assert slide.backend == "flat" and slide.mpp_um == pytest.approx((0.5, 0.5))
        np.testing.assert_array_equal(slide.read(0, 70, 130, 150, 201), image[70:220, 130:331])


def test_vendors_own_kinds_are_refused_by_url(s3, tmp_path):
    path = tmp_path / "v.tif"
    tifffile.imwrite(path, picture(64, 64), photometric="rgb", tile=(64, 64), description="<Philips/>", metadata=None)
    s3.files.put(str(path), "s3://bucket/v.tif")
    with pytest.raises(InputError) as caught:
        open_slide("s3://bucket/v.tif", 0.5)
    assert one_line(caught, "s3://bucket/v.tif", "Philips", "copy it to a local disk")
    with pytest.raises(InputError, match="OpenSlide reads no URL"):
        open_slide(SLIDE, 0.5, "openslide")


def test_info(s3, uploaded, phantom):
    said, local = describe(uploaded), describe(phantom.slide)
    assert said.whole and said.path == uploaded and said.kind == "slide"
    for name in ("size", "pixel size", "levels", "level 1", "decoded"):
        assert said.fact(name) == local.fact(name), name
    data = phantom.slide.read_bytes()
    s3.files.pipe("s3://bucket/cut.tif", data[: len(data) // 2])
    try:
        cut = describe("s3://bucket/cut.tif")
        assert not cut.whole and "cut off" in cut.problems[0]
    except InputError as error:  # its directory lies in the half that is gone
        assert "s3://bucket/cut.tif" in str(error)


def test_missing_key_bucket_and_folder(s3, uploaded):
    for url in ("s3://bucket/none.tif", "s3://nobody/none.tif"):
        for ask in (open_slide, content_digest, describe):
            with pytest.raises(InputError) as caught:
                ask(url)
            assert one_line(caught, url, "check the address")
    with pytest.raises(InputError, match="is a folder"):
        open_slide("s3://bucket/slides", 0.5)


def test_no_permission(s3, uploaded):
    s3.fail(403, 1000)
    for ask in (open_slide, content_digest, describe):
        before = len(s3.asked)
        with pytest.raises(InputError) as caught:
            ask(uploaded)
        assert one_line(caught, uploaded, "access is refused", "credentials")
        assert len(s3.asked) - before <= 2  # asking again would not help
    s3.fail(403, 1000, ("GET",))  # its head may be seen, its bytes may not
    with pytest.raises(InputError, match="access is refused"):
        content_digest(uploaded)


@pytest.mark.parametrize(("status", "times"), [(500, 5), (503, 3)])
def test_a_store_that_fails_for_a_while(s3, uploaded, phantom, status, times):
    slide, local = open_slide(uploaded), open_slide(phantom.slide, backend="tiff")
    s3.fail(status, times)
    np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 300), local.read(0, 0, 0, 300, 300))
    assert [s for *_, s in s3.asked[-30:]].count(status) == times


def test_a_web_server_that_fails_for_a_while(web, phantom, caplog, monkeypatch):
    monkeypatch.setattr(remote, "_told_at_s", -remote.TOLD_EVERY_S)
    url, plan = web(phantom.slide)
    plan += [503, 503, 500]  # head, then get, as the client asks for the size
    slide, local = open_slide(url), open_slide(phantom.slide, backend="tiff")
    assert plan == []
    # Once, however often it is asked again within half a minute.
    assert [r.message for r in caplog.records if r.name == remote.__name__] == [
        f"{url} does not answer (ClientResponseError): asked again, 2 of {remote.FIRST_TRIES}"
    ]
    plan += [503, 429, "half", 500]
    np.testing.assert_array_equal(slide.read(0, 0, 0, 100, 100), local.read(0, 0, 0, 100, 100))
    assert plan == []
    plan += [500] * 100
    with pytest.raises(StorageError) as caught:
        slide.read(0, 200, 200, 100, 100)
    assert one_line(caught, url, "the store keeps failing (500", "later") and len(plan) == 100 - remote.TRIES
    plan[:] = ["whole"]
    with pytest.raises(InputError) as caught:
        slide.read(0, 200, 200, 100, 100)
    assert one_line(caught, url, "does not serve byte ranges")
    plan[:] = [403, 403]
    with pytest.raises(InputError) as caught:
        open_slide(url + "?X-Signature=secret")
    assert one_line(caught, url, "access is refused") and "secret" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    import fsspec

    real = fsspec.core.get_filesystem_class

    def absent(protocol):
        if protocol == "s3":
            raise ImportError("Install s3fs to access S3")
        return real(protocol)

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", absent)
    with pytest.raises(InputError) as caught:
        open_slide("s3://elsewhere/slide.tif")
    assert one_line(caught, "s3:// needs a package that is not installed", "pip install 'deepfere[s3]'")
    with pytest.raises(InputError, match="ftpx:// is not known"):
        content_digest("ftpx://elsewhere/slide.tif")


@pytest.mark.ray
def test_fuse_by_url(s3, ray_session, uploaded, phantom, tmp_path, cli):
    """A result like that of the local file, by its identity too; and refusals before anything is written."""
    quick = ["model.tier=T1", "tracking.uri=none", "model.null_guides=4", "model.smoothing_pitch=0.3"]
    quick += ["--factor", "4", "--alignment", phantom.truth / "alignment.json", "--slide-icc", "srgb"]
    out = tmp_path / "url.zarr"
    done = cli("fuse", phantom.imzml, uploaded, "-o", out, *quick)
    assert done.code == 0, done
    result = deepfere.open(out)
    assert result.provenance["section"]["slide"] == uploaded
    assert result.provenance["inputs"]["slide"] == content_digest(phantom.slide)
    assert result.provenance["slide"]["backend"] == "tiff"
    assert any("carries no profile" in line for line in result.provenance["warnings"])
    assert "carries no profile" in done.err
    assert (result.stain().compute() < 128).any()
    for slide in (uploaded, phantom.slide):  # what a slide is does not depend on where it lies
        again = cli("fuse", phantom.imzml, slide, "-o", out, *quick)
        assert again.code == 0 and "finished already" in again.out
    for url, words in {
        "s3://bucket/none.tif": ("does not exist",),
        "https://127.0.0.1:9/a.tif?key=value": ("cannot be read",),
    }.items():
        refused = cli("fuse", phantom.imzml, url, "-o", tmp_path / "no.zarr", *quick)
        assert refused.code == 2 and len(refused.errors) == 1 and all(w in refused.errors[0] for w in words)
        assert not list(tmp_path.glob("no*"))


@pytest.mark.ray
def test_a_study_by_url(s3, ray_session, uploaded, phantom, tmp_path, cli):
    study = tmp_path / "study.yaml"
    rows = {
        name: {"name": name, "msi": phantom.imzml, "slide": slide, "alignment": phantom.truth / "alignment.json"}
        for name, slide in {"far": uploaded, "near": phantom.slide}.items()
    }
    study.write_text(json.dumps({"sections": list(rows.values())}, default=str))
    assert uploaded in describe(study).fact("far")
    done = cli("tile", study, "-o", tmp_path / "work", "--factor", "4", "tracking.uri=none")
    assert done.code == 0, done
    facts = [json.loads((tmp_path / "work" / "done" / f"tile-{n}.json").read_text()) for n in ("far", "near")]
    assert facts[0]["shards"] == facts[1]["shards"] > 0
    far, near = ((tmp_path / "work" / "sections" / n / "planes.zarr") for n in ("far", "near"))
    files = [p.relative_to(near) for p in sorted(Path(near).rglob("*")) if p.is_file()]
    assert len(files) > 2 and all((far / p).read_bytes() == (near / p).read_bytes() for p in files)
    study.write_text(study.read_text().replace("section.tif", "gone.tif"))
    gone = cli("tile", study, "-o", tmp_path / "other", "tracking.uri=none")
    assert gone.code == 2 and "section far" in gone.errors[0] and "does not exist" in gone.errors[0]
    assert not (tmp_path / "other").exists()
