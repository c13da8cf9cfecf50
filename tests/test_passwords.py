"""Passwords in addresses are found wherever they stand, and what looks like one is left alone."""

from __future__ import annotations

import pytest

from fewstep.passwords import has_password, without_password

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://u:hunter2@h:5000/x", "http://h:5000/x"),
        (" https://u:hunter2@h", " https://h"),
        ("http://u:hunt@hunter2@h", "http://h"),
        ("http://u:hunter2/more@h", "http://h"),
        ("postgresql://u:123/hunter2@h/db", "postgresql://h/db"),
        ("postgresql+psycopg://u@h/db?password=hunter2", "postgresql+psycopg://u@h/db?password=…"),
        ("postgresql://h/db?a=1&sslpassword=hunter2&b=2", "postgresql://h/db?a=1&sslpassword=…&b=2"),
        ("s3://KEY:7/hunter2@bucket/x", "s3://bucket/x"),
        ("u:hunter2@host:5000", "host:5000"),
        ("https://host/x?X-Token=hunter2", "https://host/x?X-Token=…"),
    ],
)
def test_a_password_is_found_and_not_shown(address: str, shown: str) -> None:
    assert has_password(address)
    assert without_password(address) == shown
    assert SECRET not in shown


@pytest.mark.parametrize(
    "address",
    [
        "http://h:5000/a@b", "http://u@h:5000", "http://[::1]:5000/x@y", "http://h:5000?x=1@2", "https://h",
        "models:/few@champion", "models:/few/3", "s3://bucket/a@b", "s3://bucket/x:1@y", "sqlite:////tmp/a@b.db",
        "postgresql://h:5432/db", "postgresql+psycopg://u@h/db", "file:///a:b@c", "/tmp/a:b@c", "data/a:b@c/d",
    ],
)  # fmt: skip
def test_what_is_none_is_left_alone(address: str) -> None:
    assert not has_password(address)
    assert without_password(address) == address
