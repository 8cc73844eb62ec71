"""Slides at ``gs://``, from a server of Google Cloud Storage's protocol on the loopback."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from deepfere import remote
from deepfere.errors import InputError
from deepfere.inspect import describe
from deepfere.readers.digest import content_digest
from deepfere.readers.slide import open_slide

from .test_slide_zarr import write_ome_zarr


@pytest.fixture(scope="module")
def gs():
    """Files of a server with one empty bucket; ``gs://bucket`` leads to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # gcsfs asks by gRPC what kind a bucket is; the server speaks HTTP alone, and each question would wait a minute.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setattr(remote, "PAUSE_S", 0.01)
        import gcsfs
        from gcp_storage_emulator.server import create_server

        server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        gcsfs.GCSFileSystem.clear_instance_cache()
        try:
            yield gcsfs.GCSFileSystem()
        finally:
            gcsfs.GCSFileSystem.clear_instance_cache()
            server.stop()


def test_a_slide_is_read_as_the_local_file_is(gs, phantom):
    url = "gs://bucket/slides/section.tif"
    gs.put(str(phantom.slide), url)
    assert content_digest(url) == content_digest(phantom.slide)
    there, here = open_slide(url), open_slide(phantom.slide)
    assert there.mpp_um == here.mpp_um and there.shape_px == here.shape_px
    np.testing.assert_array_equal(there.read(0, 100, 130, 300, 401), here.read(0, 100, 130, 300, 401))
    for name in ("size", "pixel size", "levels"):
        assert describe(url).fact(name) == describe(phantom.slide).fact(name), name


def test_an_ome_zarr_slide(gs, tmp_path):
    root = tmp_path / "slide.zarr"
    write_ome_zarr(root, np.random.default_rng(1).integers(0, 256, (200, 240, 3), dtype=np.uint8))
    # The server takes a last carriage return of what is put for its own.
    assert not any(path.read_bytes().endswith(b"\r") for path in root.rglob("*") if path.is_file())
    gs.put(str(root), "gs://bucket/slide.zarr", recursive=True)
    there, here = open_slide("gs://bucket/slide.zarr"), open_slide(root)
    assert there.mpp_um == here.mpp_um
    np.testing.assert_array_equal(there.read(0, 20, 30, 100, 120), here.read(0, 20, 30, 100, 120))


def test_what_is_not_there_is_told_in_one_line(gs):
    for url in ("gs://bucket/none.tif", "gs://nobody/none.tif"):
        for ask in (open_slide, content_digest, describe):
            with pytest.raises(InputError, match="check the address") as caught:
                ask(url)
            assert url in str(caught.value) and "\n" not in str(caught.value)
