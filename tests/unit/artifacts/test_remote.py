"""A store on S3 (a moto server) and on other file systems, mirrored by several hosts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from artifacts import ArtifactDamaged, ArtifactMissing, MirroredStore, Store, open_store, stage_key
from lorasuite.errors import foreseen
from tests.s3 import answering, bucket

KEY = stage_key("thing", 1, {}, {"a": "1"})


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with bucket() as address:
        yield address


@pytest.fixture(params=["s3", "directory", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    name = tmp_path.name
    return {"s3": f"{s3}/{name}", "directory": f"file://{tmp_path}/remote", "memory": f"memory://{name}"}[request.param]


def put(store: Store, value: float = 1.0, replace: bool = False) -> Any:
    return store.put(
        KEY,
        stage="thing",
        version=1,
        settings={},
        inputs={"a": "1"},
        tensors={"x": torch.full((3,), value)},
        info={"value": value},
        files={"folder/note.txt": b"hello"},
        replace=replace,
    )


def test_what_one_host_makes_another_reads(remote: str, tmp_path: Path) -> None:
    put(MirroredStore(tmp_path / "one", remote))
    other = open_store(tmp_path / "two", remote)
    assert other.has(KEY)
    artifact = other.open(KEY)
    assert artifact.tensor("x").tolist() == [1.0] * 3
    assert artifact.file("folder/note.txt").read_bytes() == b"hello"
    assert Store(tmp_path / "two").open(KEY).info == {"value": 1.0}, "it is in the mirror"
    assert not list((tmp_path / "two" / "tmp").iterdir())
    with pytest.raises(ArtifactMissing):
        MirroredStore(tmp_path / "two", remote).open(stage_key("other", 1, {}, {}))


def files(remote: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(remote, use_listings_cache=False)
    return fs, f"{root}/objects/{KEY[:2]}/{KEY}"


def test_without_its_manifest_nothing_is_there(remote: str, tmp_path: Path) -> None:
    """As after an upload that was interrupted: the manifest comes last."""
    put(MirroredStore(tmp_path / "one", remote))
    fs, folder = files(remote)
    fs.rm_file(f"{folder}/manifest.json")
    two = MirroredStore(tmp_path / "two", remote)
    assert not two.has(KEY)
    put(two, 1.0)
    assert MirroredStore(tmp_path / "three", remote).open(KEY).info == {"value": 1.0}


@pytest.mark.parametrize("how", ["changed", "cut", "missing", "manifest"])
def test_damage_is_never_used(remote: str, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    put(MirroredStore(tmp_path / "one", remote))
    fs, folder = files(remote)
    name = "manifest.json" if how == "manifest" else "data.safetensors"
    whole = fs.cat_file(f"{folder}/{name}")
    if how == "missing":
        fs.rm_file(f"{folder}/{name}")
    else:
        fs.pipe_file(f"{folder}/{name}", whole[:-1] if how == "cut" else whole[:-2] + b"??")
    two = MirroredStore(tmp_path / "two", remote)
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactMissing):
        two.open(KEY)
    assert KEY in caplog.text
    put(two)
    assert MirroredStore(tmp_path / "three", remote).open(KEY).tensor("x").tolist() == [1.0] * 3


def test_a_damaged_mirror_is_filled_again(remote: str, tmp_path: Path) -> None:
    store = MirroredStore(tmp_path / "one", remote)
    put(store)
    for name in ("data.safetensors", "manifest.json"):
        (store.path(KEY) / name).write_bytes(b"damaged")
        with pytest.raises(ArtifactDamaged):
            Store(tmp_path / "one").open(KEY)
        assert store.open(KEY).tensor("x").tolist() == [1.0] * 3
    store.remove(KEY)
    assert store.open(KEY).info == {"value": 1.0}
    (store.path(KEY) / "manifest.json").write_bytes(b"damaged")
    put(store)
    assert Store(tmp_path / "one").open(KEY).info == {"value": 1.0}


def test_a_replaced_object_reaches_the_others(remote: str, tmp_path: Path) -> None:
    one = MirroredStore(tmp_path / "one", remote)
    put(one)
    put(one, 2.0, replace=True)
    assert MirroredStore(tmp_path / "two", remote).open(KEY).tensor("x").tolist() == [2.0] * 3


@pytest.mark.parametrize("swapped", ["data.safetensors", ""], ids=["a file", "all of it"])
def test_another_objects_bytes_are_never_used(
    s3: str, swapped: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = f"{s3}/{tmp_path.name}"
    put(MirroredStore(tmp_path / "one", remote))
    other = stage_key("thing", 1, {}, {"a": "2"})
    MirroredStore(tmp_path / "one", remote).put(
        other, stage="thing", version=1, settings={}, inputs={"a": "2"}, tensors={"x": torch.full((3,), 2.0)},
        files={"folder/note.txt": b"hello"},
    )  # fmt: skip
    fs, _ = files(remote)
    kept = {f"/{name}": fs.cat_file(name) for name in fs.find(remote)}

    def wrong(path: str) -> bytes | None:
        return kept.get(path.replace(f"{KEY[:2]}/{KEY}", f"{other[:2]}/{other}") if path.endswith(swapped) else path)

    with answering(wrong), caplog.at_level(logging.WARNING), pytest.raises(ArtifactMissing):
        MirroredStore(tmp_path / "two", remote).open(KEY)
    assert not swapped or "the bytes of data.safetensors are not those that were stored" in caplog.text
    assert MirroredStore(tmp_path / "two", remote).open(KEY).tensor("x").tolist() == [1.0] * 3


def test_a_server_that_does_not_answer(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = f"{s3}/{tmp_path.name}"
    put(MirroredStore(tmp_path / "one", remote))
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 0.2)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 3)
    asked, over = list[str](), threading.Event()

    def silent(path: str) -> None:
        asked.append(path)
        over.wait(60)

    with answering(silent):
        with pytest.raises(Exception) as raised:
            MirroredStore(tmp_path / "two", remote).open(KEY)
        over.set()
    assert len(asked) == 3
    told = foreseen(raised.value)
    assert told is not None and "network: no answer" in str(told)
    assert MirroredStore(tmp_path / "two", remote).open(KEY).tensor("x").tolist() == [1.0] * 3


def test_no_remote_is_a_plain_store(tmp_path: Path) -> None:
    assert type(open_store(tmp_path)) is Store
    with pytest.raises(ValueError, match="nosuch"):
        MirroredStore(tmp_path, "nosuch://x")
