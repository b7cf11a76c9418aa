"""A migrated miniature adapter's report, and a fleet's, in a real browser. Pictures are kept in build/screenshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.migrate_adapter import migrate_adapter
from lorasuite import zoo
from lorasuite.evaluation import Arm
from lorasuite.reporting import RECORD, MigrationRecord, arm_seconds, write_fleet
from tasks.training_stages import finetune, searching, selection
from tasks.transform_stages import model_fit, transform
from tests.browser import Seen, needs_chromium, page

KEPT = Path(__file__).parents[2] / "build" / "screenshots"
WIDTHS = {"phone": 360, "desktop": 1280}


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A zoo adapter by ``auto``, with a short fine-tune, its control and an evaluation of every arm."""
    root, pair = tmp_path_factory.mktemp("report"), zoo.pair("llama")
    zoo.write_rows(zoo.rows("llama", "blend", "train", 40), root / "train.jsonl")
    zoo.write_rows(zoo.rows("llama", "blend", "test", 24), root / "test.jsonl")
    zoo.write_rows([{"text": text} for text in zoo.texts("llama", 24)], root / "texts.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASUITE_HOME", str(root / "home"))
        return migrate_adapter(
            {
                "adapter": str(pair.adapter("blend")),
                "old_base": str(pair.old),
                "new_base": str(pair.new),
                "output": str(root / "out" / "blend"),
                "calibration": str(root / "texts.jsonl"),
                "train_data": str(root / "train.jsonl"),
                "eval_data": str(root / "test.jsonl"),
                "method": "auto",
                "candidates": ["all"],
                "finetune": {"epochs": 2, "learning_rate": 1e-2},
                "evaluation": {"max_new_tokens": 12},
                "gate": {"lower_bound": True, "max_negative_flips": 0.5},
            }
        )


def nothing_amiss(seen: Seen, file: Path) -> None:
    """No error, no request but for the page itself, and nothing sticks out to the side."""
    assert seen.errors == [] and set(seen.requests) == {file.as_uri()}
    sizes = seen.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert sizes[0] <= sizes[1], "the page scrolls sideways"


@needs_chromium
@pytest.mark.parametrize("device", WIDTHS)
def test_the_report(device: str, migrated: dict[str, Any]) -> None:
    file = Path(migrated["output"]) / "report.html"
    KEPT.mkdir(parents=True, exist_ok=True)
    with page(width=WIDTHS[device]) as seen:
        for scheme in ("light", "dark"):
            seen.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            seen.page.goto(file.as_uri())
            nothing_amiss(seen, file)
            seen.page.screenshot(path=KEPT / f"report-{device}-{scheme}.png", full_page=True)
        sections = seen.page.locator("main section")
        assert sections.count() == 12
        for number in range(sections.count()):
            section = sections.nth(number)
            assert section.is_visible() and len(section.inner_text()) > 60
        figures = seen.page.get_by_role("img")
        assert figures.count() == 4, "loss curves, heat map, heads, alignment"
        for number in range(4):
            assert figures.nth(number).bounding_box()["width"] > 200  # type: ignore[index]
        assert seen.page.locator("#verdict").bounding_box()["y"] < 300  # type: ignore[index]
        # by keyboard: past the contents, and what is folded up opens
        seen.page.keyboard.press("Tab")
        assert seen.page.evaluate("document.activeElement.className") == "skip"
        seen.page.keyboard.press("Enter")
        assert seen.page.evaluate("document.activeElement.id") == "main"
        folded = seen.page.locator("#results details")
        folded.locator("summary").focus()
        seen.page.keyboard.press("Enter")
        assert folded.get_by_text("Bits per byte, lower is better").is_visible()
        nothing_amiss(seen, file)
        if device == "desktop":
            seen.page.pdf(path=KEPT / "report.pdf", format="A4")


def test_what_the_record_says_of_it(migrated: dict[str, Any]) -> None:
    assert {name: served["ok"] for name, served in migrated["serving"].items()} == {
        "peft": True, "transformers": True, "vllm": True, "llama.cpp": True,
    }  # fmt: skip
    pairs = {(one["first"], one["metric"]) for one in migrated["comparisons"]}
    assert pairs == {(arm, m) for arm in ("old+adapter", "new", "scratch") for m in ("exact_match", "bits_per_byte")}
    assert set(migrated["alignment"]["residual"]) == set(migrated["layer_map"])
    assert all(0 <= r <= 1 for ends in migrated["alignment"]["residual"].values() for r in ends.values())
    assert migrated["verdict"]["checks"][0]["name"] == "share of the lead kept"


def test_the_seconds_of_an_arm_are_those_of_its_stages(migrated: dict[str, Any]) -> None:
    """By the names and labels that the flow gives stages, with ``auto``."""
    record = MigrationRecord.read(Path(migrated["output"]) / RECORD)
    spent: dict[tuple[str, str | None], float] = {(r.stage, r.label): r.computed_seconds for r in record.timings}
    made = {transform.name, model_fit.name, selection.name}
    assert made <= {stage for stage, _ in spent}, "auto tries transforms of both kinds and chooses"
    moved = sum(seconds for (stage, _), seconds in spent.items() if stage in made)
    searched = sum(seconds for (stage, _), seconds in spent.items() if stage == searching.name)
    found = {Arm.MIGRATED: moved, Arm.MIGRATED_LFT: moved + searched}
    fresh = spent.get((finetune.name, "scratch"))
    assert (fresh is None) == record.published.is_new, "the control is trained where the search did not publish it"
    if fresh is not None:
        found[Arm.SCRATCH] = fresh
    assert arm_seconds(record) == pytest.approx(found) and searched > 0


@needs_chromium
@pytest.mark.parametrize("device", WIDTHS)
def test_a_fleet(device: str, migrated: dict[str, Any], tmp_path: Path) -> None:
    def row(name: str, verdict: str, kept: float | None, seconds: float) -> dict[str, Any]:
        return {
            "name": name, "pair": "old → new", "verdict": verdict, "reason": "why it is so", "kept": kept,
            "kept_interval": None, "cached": False, "seconds": seconds, "retry": None, "output": "", "adapter": name,
            "report": None if kept is None else str(Path(migrated["output"]) / "report.html"),
        }  # fmt: skip

    rows = [row("ten", "ship", 0.95, 10), row("nine", "retrain", 0.1, 9), row("none", "failed", None, 0)]
    file = write_fleet(tmp_path, {"adapters": rows}, "fleet.yaml")
    KEPT.mkdir(parents=True, exist_ok=True)
    with page(width=WIDTHS[device]) as seen:
        for scheme in ("dark", "light"):
            seen.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            seen.page.goto(file.as_uri())
            nothing_amiss(seen, file)
            seen.page.screenshot(path=KEPT / f"fleet-{device}-{scheme}.png", full_page=True)
        if device == "desktop":
            seen.page.pdf(path=KEPT / "fleet.pdf", format="A4")
        names = seen.page.locator("tbody th")
        assert names.all_inner_texts() == ["ten", "nine", "none"]
        kept = seen.page.get_by_role("button", name="lead kept")
        kept.focus()
        seen.page.keyboard.press("Enter")
        assert names.all_inner_texts() == ["nine", "ten", "none"]
        seen.page.keyboard.press("Enter")
        assert names.all_inner_texts() == ["ten", "nine", "none"], "what is missing stays last"
        head = seen.page.locator("th[aria-sort]")
        assert head.count() == 1 and head.get_attribute("aria-sort") == "descending"
        assert seen.page.get_by_role("status").inner_text() == "Sorted by lead kept, descending."
        seen.page.get_by_role("link", name="ten").click()
        assert "blend" in seen.page.get_by_role("heading", level=1).inner_text()
        assert seen.errors == []
