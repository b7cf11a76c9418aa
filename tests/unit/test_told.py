"""What messages do not tell: what an address shows who may use it with, and lines without end."""

from __future__ import annotations

import pytest

from lorasuite.errors import ConfigError, LoRASuiteError, Problem, told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@host/x", "https://***@host/x"),
        ("https://me:hunter2@part@host/x?a=1", "https://***@host/x?a=1"),
        ("https://hunter2@host", "https://***@host"),
        ("redis://:hunter2@[::1]:6379/0, s3://hunter2:x@b", "redis://***@[::1]:6379/0, s3://***@b"),
        ("https://h/x?X-Amz-Signature=hunter2&b=2", "https://h/x?***&b=2"),
        ("https://h/x?b=2&access_token=hunter2#c", "https://h/x?b=2&***#c"),
        ("hf://org/set@v1/main:train and hf://set@v1", "hf://org/set@v1/main:train and hf://set@v1"),
        ("https://h/models@main and org/name@main", "https://h/models@main and org/name@main"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert told(text) == shown
    for error in (LoRASuiteError(text), ConfigError(Problem(text, text, text))):
        assert "hunter2" not in str(error) and "hunter2" not in str([p.to_dict() for p in error.problems])


def test_lines_are_cut() -> None:
    lines = str(ConfigError(Problem("x" * 10**6, "y\n" * 3 + "z" * 10**6, "w"))).split("\n")
    assert max(map(len, lines)) < 4_100
