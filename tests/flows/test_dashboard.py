"""What a migration leaves in Prefect: names, tags, artifacts, progress."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.dashboard import slug
from flows.migrate_adapter import migrate_adapter
from tests.flows.small import Small


def test_what_a_migration_leaves(home: Path, small: Small, tmp_path: Path) -> None:
    data = {"train_data": str(small.root / "train.jsonl"), "eval_data": str(small.root / "test.jsonl")}
    settings = {"finetune": {"batch_size": 4, "epochs": 1}, "evaluation": {"generate": False}, "controls": False}
    state: Any = migrate_adapter(small.settings("one", tmp_path / "out", **data, **settings), return_state=True)
    record: dict[str, Any] = state.result()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), limit=200)
    assert run.name == "one: small-old → small-new"
    assert set(run.tags) == {"pair:small-old→small-new", "adapter:one"}
    named = {a.key: a for a in found if a.key}
    assert set(named) == {"pair-small-old-small-new", "before-after-one-small-new", "verdict-one-small-new"}

    page = str(named["pair-small-old-small-new"].data)
    picture = page.split("data:image/png;base64,")[1].split(")")[0]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    for old, new in record["layer_map"].items():
        assert f"| {old} | {new} |" in page

    rows = json.loads(str(named["before-after-one-small-new"].data))
    assert [row["arm"] for row in rows] == [
        "old base", "old base + adapter", "new base", "migrated, no LFT", "migrated + LFT",
    ]  # fmt: skip
    verdict = str(named["verdict-one-small-new"].data)
    assert record["verdict"]["verdict"] in verdict and str(tmp_path / "out" / "report.html") in verdict

    progress = [a for a in found if a.type == "progress"]
    told = [str(a.description) for a in progress]
    assert all(float(str(a.data)) == 100 for a in progress), told
    assert any(text.startswith("finetune (migrated): 3 of 3, loss ") for text in told)
    assert sum(text.startswith("evaluate (") for text in told) == 5


def test_keys_of_artifacts() -> None:
    assert slug("pair", "Llama-2_7b.hf→Meta/Llama 3") == "pair-llama-2-7b-hf-meta-llama-3"
