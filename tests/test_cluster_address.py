"""Addresses of a cluster that are none are refused at once; Ray itself would look for a quarter of an hour."""

from __future__ import annotations

import socket

import pytest

from deepfere.cluster import connect
from deepfere.config import RaySettings
from deepfere.errors import InputError


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("foo", "foo: is no address of a cluster; give ray.address=HOST:PORT"),
        ("10.0.0.5:", "is no address of a cluster"),
        ("no.such.host.invalid:6379", "no Ray cluster answers"),
        (None, "no Ray cluster answers"),
        ("127.0.0.1:99999999", "no Ray cluster answers"),
    ],
)
def test_addresses_where_nobody_is(monkeypatch, address, words):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was asked"))
    with pytest.raises(InputError, match=words):
        connect(RaySettings(address=address or free_address()))
