"""The artifact store: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import artifacts.collection
import artifacts.store
from artifacts import ArtifactDamaged, ArtifactError, ArtifactMissing, Manifest, Store, default_home, leases, stage_key

ROOT = Path(__file__).parents[3]
KEY = stage_key("similarity", 1, {"metric": "cka"}, {"old": "a" * 64})

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
UNSIGNED = [torch.uint64, torch.uint32, torch.uint16]


def put(store: Store, key: str = KEY, **given: Any) -> Manifest:
    given = {"tensors": {"cka": torch.eye(3)}, **given}
    return store.put(key, stage="similarity", version=1, settings={"metric": "cka"}, inputs={"old": "a" * 64}, **given)


def every_dtype() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in FLOATS + FLOAT8}
    tensors |= {str(dtype): torch.randint(0, 100, (7,)).to(dtype) for dtype in INTEGERS + UNSIGNED}
    return tensors | {
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "a view": torch.arange(10)[2:4],
        "needs grad": torch.ones(2, requires_grad=True),
        "conjugated": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj(),
        "non-finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [t.detach().resolve_conj().contiguous().reshape(-1) for t in (one, other)]
    return one.numel() == 0 or torch.equal(*(t.view(torch.uint8) for t in flat))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_round_trip_of_every_dtype(store: Store) -> None:
    tensors = every_dtype()
    manifest = put(store, tensors=tensors)
    artifact = store.open(KEY)
    assert artifact.keys() == sorted(tensors)
    for name, tensor in tensors.items():
        assert same(artifact.tensor(name), tensor), name
    plain = load_file(store.path(KEY) / "data.safetensors")
    assert all(same(plain[name], tensor) for name, tensor in tensors.items())
    assert artifact.manifest == manifest
    assert {"python", "torch", "safetensors"} <= set(manifest.libraries)
    assert manifest.size == sum(entry.size for entry in manifest.files.values())


def test_info_files_and_settings_come_back(store: Store, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    (adapter / "nested").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "nested" / "weights.bin").write_bytes(b"\x00\x01")
    info = {"layer_map": {"0": 1}, "losses": [0.1, 1e-300, 5], "text": "déjà vu", "none": None}
    put(store, info=info, files={"adapter": adapter, "samples.jsonl": b"{}\n"})
    artifact = store.open(KEY)
    assert artifact.info == info
    assert artifact.file("samples.jsonl").read_bytes() == b"{}\n"
    assert (artifact.file("adapter") / "nested" / "weights.bin").read_bytes() == b"\x00\x01"
    assert artifact.file("adapter/adapter_config.json").read_text() == "{}"
    with pytest.raises(ArtifactMissing, match="no file"):
        artifact.file("adapt")
    with pytest.raises(ArtifactMissing, match="no tensor 'x'"):
        artifact.tensor("x")


def test_an_object_without_tensors(store: Store) -> None:
    put(store, tensors={}, info={"n": 1})
    assert store.open(KEY).tensors() == {}
    assert load_file(store.path(KEY) / "data.safetensors") == {}


def test_tensors_are_taken_one_at_a_time_and_info_is_read_after_them(store: Store) -> None:
    info: dict[str, Any] = {}
    alive = 0
    most = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal alive, most
        for index in range(20):
            alive += 1
            most = max(most, alive)
            yield f"t{index}", torch.full((1000,), float(index)).as_subclass(Counted)
        info["count"] = 20

    put(store, tensors=stream(), info=info)
    assert most <= 3
    assert store.open(KEY).info == {"count": 20}
    assert store.open(KEY).tensor("t7").tolist() == [7.0] * 1000


def test_the_digest_is_of_the_content_not_of_the_order(tmp_path: Path) -> None:
    tensors = every_dtype()
    one = put(Store(tmp_path / "one"), tensors=tensors)
    other = put(Store(tmp_path / "other"), tensors=reversed(list(tensors.items())))
    assert one.digest == other.digest
    assert one.files == other.files
    for change in (
        {"cka": torch.eye(3) + 1e-6},
        {"cka": torch.eye(3).double()},
        {"cka": torch.eye(3).reshape(9)},
        {"CKA": torch.eye(3)},
    ):
        changed = put(Store(tmp_path / str(len(list(tmp_path.iterdir())))), tensors=change)
        assert changed.digest != put(Store(tmp_path / "eye")).digest


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a\\b", "a\0b"])
def test_a_file_cannot_leave_its_object(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        put(store, files={name: b""})
    assert not store.has(KEY)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"info": {"loss": [float("nan")]}}, ValueError, r"info.loss\[0\] is nan"),
        ({"info": {"loss": torch.ones(1)}}, TypeError, "info.loss is a Tensor"),
        ({"info": {1: 2}}, TypeError, "only text keys"),
        ({"tensors": {"x": 1}}, TypeError, "not a tensor"),
        ({"tensors": {"x": torch.empty(1, device="meta")}}, TypeError, "cannot be stored"),
        ({"tensors": {"x": torch.eye(2).to_sparse()}}, TypeError, "cannot be stored"),
        ({"tensors": [("x", torch.ones(1)), ("x", torch.ones(1))]}, ValueError, "given twice"),
        ({"files": {"a": b"", "./a": b""}}, ValueError, "given twice"),
        ({"files": {"a": Path("does-not-exist")}}, FileNotFoundError, "does-not-exist"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(
    store: Store, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        put(store, **given)
    assert list(store.ls()) == []
    assert list((store.home / "tmp").iterdir()) == []


@pytest.mark.parametrize("key", ["", "abc", "../" + "a" * 61, "A" * 64, "a" * 65])
def test_only_keys_become_directories(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="not an artifact key"):
        store.open(key)


def test_missing(store: Store) -> None:
    assert not store.has(KEY)
    with pytest.raises(ArtifactMissing, match="is not in") as caught:
        store.open(KEY)
    assert isinstance(caught.value, (ArtifactError, KeyError))
    assert not str(caught.value).startswith(("'", '"'))
    with pytest.raises(ArtifactMissing):
        store.remove(KEY)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[:-1])
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[how]] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["data.safetensors", "manifest.json", "files/adapter/x.bin"])
@pytest.mark.parametrize("how", ["first", "middle", "last", "truncate", "delete"])
def test_damage_is_found_and_replaced(store: Store, name: str, how: str) -> None:
    put(store, info={"a": 1}, files={"adapter/x.bin": b"12345"})
    store.open(KEY)
    path = store.path(KEY) / name
    if name == "manifest.json" and how in ("last", "truncate"):
        path.write_text(path.read_text().rstrip())  # the last byte of the file is a mere newline
    damage(path, how)
    with pytest.raises(ArtifactDamaged, match=r"Run its stage again|manifest"):
        store.open(KEY)
    with pytest.raises(ArtifactDamaged):
        store.verify(KEY)
    if how in ("truncate", "delete"):
        assert not store.has(KEY)
    put(store, info={"a": 1}, files={"adapter/x.bin": b"12345"})
    store.verify(KEY)
    assert store.open(KEY).tensor("cka").equal(torch.eye(3))
    assert [path.name.split("-")[0] for path in (store.home / "tmp").iterdir()] == ["damaged"]


def test_every_single_flipped_byte_is_found(store: Store) -> None:
    put(store, tensors={"a": torch.arange(2, dtype=torch.uint8), "b": torch.tensor(1.0)}, info={"x": [1, "y"]})
    for name in ("data.safetensors", "manifest.json"):
        path = store.path(KEY) / name
        good = path.read_bytes()
        for index in range(len(good)):
            if good[index : index + 1].isspace():
                continue  # white space between JSON tokens carries nothing
            path.write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
            with pytest.raises(ArtifactDamaged):
                store.verify(KEY)
        path.write_bytes(good)
    store.verify(KEY)


def test_a_manifest_of_another_object_or_format_is_refused(store: Store) -> None:
    other = stage_key("other", 1, {}, {})
    put(store)
    store.path(other).parent.mkdir(parents=True)
    store.path(KEY).rename(store.path(other))
    with pytest.raises(ArtifactDamaged, match="that of"):
        store.open(other)
    with pytest.raises(ArtifactDamaged, match="checksum"):
        Manifest.from_json('{"format": 1, "checksum": "x"}', "here")
    with pytest.raises(ArtifactDamaged, match="unreadable"):
        Manifest.from_json("[]", "here")


def test_an_object_is_read_in_full_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store)
    for path in store.path(KEY).iterdir():
        os.utime(path, (time.time() - 60,) * 2)
    calls = 0
    digest = artifacts.store.hashlib.file_digest

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return digest(*args)

    monkeypatch.setattr(artifacts.store.hashlib, "file_digest", counted)
    for _ in range(3):
        store.open(KEY)
    assert calls == 1
    store.verify(KEY)
    assert calls == 2


def test_a_second_put_keeps_the_object_and_replace_does_not(store: Store) -> None:
    first = put(store)
    assert put(store, tensors={"cka": torch.zeros(1)}).created == first.created
    assert store.open(KEY).tensor("cka").shape == (3, 3)
    reader = store.open(KEY)
    put(store, tensors={"cka": torch.zeros(1)}, replace=True)
    assert store.open(KEY).tensor("cka").shape == (1,)
    assert reader.manifest == first
    kept = put(store, tensors={"cka": torch.zeros(1)}, replace=True)
    assert kept == store.open(KEY).manifest
    assert list((store.home / "tmp").iterdir()) == []


RACER = """
import sys, time, torch
from artifacts import Store
store, key, start, me = Store(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
def stream():
    for index in range(20):
        yield f"t{index}", torch.full((5000,), me)
time.sleep(max(0, start - time.time()))
manifest = store.put(key, stage="race", version=1, settings={}, inputs={}, tensors=stream(), info={"me": me})
print(manifest.info["me"], store.open(key).tensor("t3")[0].item())
"""


def start(script: str, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_writers_leave_one_whole_object(store: Store) -> None:
    key = stage_key("race", 1, {}, {})
    begin = str(time.time() + 4)
    racers = [start(RACER, str(store.home), key, begin, str(number)) for number in (1, 2)]
    outputs = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    winner = store.open(key).info["me"]
    assert {out.strip() for out, _ in outputs} == {f"{winner} {winner}"}
    assert set(store.open(key).tensor("t19").tolist()) == {winner}
    assert list((store.home / "tmp").iterdir()) == []


HALF = """
import os, sys, torch
from artifacts import Store
def stream():
    yield "a", torch.ones(100_000)
    print("writing", flush=True)
    sys.stdin.read()
Store(sys.argv[1]).put(sys.argv[2], stage="half", version=1, settings={}, inputs={}, tensors=stream())
"""


def test_a_killed_writer_leaves_nothing_visible(store: Store) -> None:
    command = [sys.executable, "-c", HALF, str(store.home), KEY]
    writer = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.wait()
    assert not store.has(KEY)
    assert list(store.ls()) == []
    leftovers = list((store.home / "tmp").iterdir())
    assert len(leftovers) == 1
    assert store.gc(dry_run=False).removals == []  # it could still be at work
    put(store)
    old = time.time() - 2 * artifacts.collection.STALE_SECONDS
    for path in (*leftovers[0].rglob("*"), leftovers[0]):
        os.utime(path, (old, old))
    report = store.gc(dry_run=False)
    assert [removal.path for removal in report.removals] == leftovers
    assert report.size > 0
    assert not leftovers[0].exists()
    assert store.has(KEY)


def age(store: Store, key: str, days: float) -> None:
    when = time.time() - days * 86400
    (store.path(key) / "last-used").touch()
    os.utime(store.path(key) / "last-used", (when, when))


def test_gc_removes_what_was_not_used_and_only_when_told(store: Store) -> None:
    keys = {name: stage_key(name, 1, {}, {}) for name in ("old", "fresh", "opened", "other")}
    for name, key in keys.items():
        store.put(key, stage=name, version=1, settings={}, inputs={}, tensors={"x": torch.ones(10)})
        age(store, key, {"fresh": 29}.get(name, 31))
    store.open(keys["opened"])
    leases.give_back()  # as if another process looked

    assert [removal.stage for removal in store.gc(stages=["other"]).removals] == ["other"]
    report = store.gc()
    assert report.dry_run
    assert {removal.stage for removal in report.removals} == {"old", "other"}
    assert report.size == sum(listed.size for listed in store.ls() if listed.key in (keys["old"], keys["other"]))
    assert all(store.has(key) for key in keys.values())

    done = store.gc(dry_run=False)
    assert done.removals == report.removals
    assert {listed.manifest.stage for listed in store.ls() if listed.manifest} == {"fresh", "opened"}
    with pytest.raises(ValueError, match="keep_days"):
        store.gc(keep_days=-1)


def test_ls_reports_damaged_objects_and_gc_removes_them(store: Store) -> None:
    bad = stage_key("bad", 1, {}, {})
    put(store)
    put(store, bad)
    damage(store.path(bad) / "manifest.json", "delete")
    listed = {entry.key: entry for entry in store.ls()}
    assert listed[KEY].problem is None
    assert listed[KEY].manifest is not None
    assert listed[bad].manifest is None
    assert "no manifest" in str(listed[bad].problem)
    leases.give_back()  # as if another process looked
    store.gc(dry_run=False)
    assert [entry.key for entry in store.ls()] == [KEY]


def test_remove(store: Store) -> None:
    put(store)
    reader = store.open(KEY)
    reader.keys()
    store.remove(KEY)
    assert not store.has(KEY)
    assert reader.tensor("cka").equal(torch.eye(3)), "an open reader is not disturbed"
    put(store)
    assert store.has(KEY)


def test_default_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path))
    assert default_home() == tmp_path
    assert Store().home == tmp_path
    monkeypatch.delenv("LORASUITE_HOME")
    assert default_home() == Path.home() / ".cache" / "lorasuite"
    monkeypatch.setenv("LORASUITE_HOME", "s3://bucket/prefix")
    with pytest.raises(ValueError, match="local directory"):
        default_home()


def test_errors_survive_pickling() -> None:
    for error in (ArtifactMissing("gone"), ArtifactDamaged("bent")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


# -- keys --------------------------------------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
SETTINGS = st.dictionaries(st.text(max_size=5), JSON, max_size=4)
INPUTS = st.dictionaries(st.text(max_size=5), st.text(min_size=1, max_size=8), max_size=4)


def shuffled(value: Any) -> Any:
    """The same JSON with every dictionary in the opposite order, and tuples for lists."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return tuple(map(shuffled, value)) if isinstance(value, list) else value


@given(st.text(min_size=1), st.integers(), SETTINGS, INPUTS)
def test_order_does_not_change_a_key(name: str, version: int, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    key = stage_key(name, version, settings, inputs)
    assert len(key) == 64
    assert key == stage_key(name, version, shuffled(settings), shuffled(inputs))
    assert key == stage_key(name, version, json.loads(json.dumps(settings)), inputs)


@given(
    st.tuples(st.text(min_size=1), st.integers(), SETTINGS, INPUTS),
    st.tuples(st.text(min_size=1), st.integers(), SETTINGS, INPUTS),
)
def test_any_difference_changes_a_key(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    same_json = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (stage_key(*one) == stage_key(*other)) == same_json
    for index in range(4):
        mixed = [*one[:index], other[index], *one[index + 1 :]]
        unchanged = json.dumps(one[index], sort_keys=True) == json.dumps(other[index], sort_keys=True)
        assert (stage_key(*mixed) == stage_key(*one)) == unchanged


def test_a_key_is_stable() -> None:
    """A change here makes every stored artifact unreachable."""
    assert stage_key("similarity", 2, {"b": [1, 0.1], "a": None}, {"old": "f"}) == (
        "5efcaf3279f73adf67897c99d9c427f750103e82b0134970ac0b96d3214c0c8f"
    )


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"x": float("nan")}, ValueError),
        ({"x": [float("inf")]}, ValueError),
        ({"x": Path("p")}, TypeError),
        ({"x": {1, 2}}, TypeError),
        ({1: "x"}, TypeError),
        ({"x": b""}, TypeError),
        ({"x": torch.tensor(1.0)}, TypeError),
    ],
)
def test_a_key_refuses_what_is_not_json(settings: dict[Any, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        stage_key("s", 1, settings, {})


def test_a_key_refuses_bad_inputs() -> None:
    with pytest.raises(TypeError, match="needs a fingerprint"):
        stage_key("s", 1, {}, {"old": Path("models/old")})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="empty fingerprint"):
        stage_key("s", 1, {}, {"old": ""})
    with pytest.raises(TypeError, match="named by a text"):
        stage_key("", 1, {}, {})
    with pytest.raises(TypeError, match="whole number"):
        stage_key("s", True, {}, {})
