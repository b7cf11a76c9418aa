"""The pages made from records: what they say, what they leave out, and whether their colours can be read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from lorasuite.errors import CheckpointError
from lorasuite.evaluation import Gate
from lorasuite.reporting import _figures as figures
from lorasuite.reporting import model_card, render, wilson, write_fleet, write_report
from lorasuite.reporting._tables import general_costs
from tests.records import NASTY, boolq, content, record, scored

SECTIONS = ("checks", "results", "general", "flips", "candidates", "training", "layers", "heads", "energy", "serving",
            "cost", "reproduce")  # fmt: skip
TEACHER = {
    "worth": True, "reason": "better than the bare new base", "measured_on": "training rows", "scored_rows": 6,
    "bits_per_byte": {"old": 4.0, "teacher": 0.1, "new": 5.0}, "rows": 94, "written": 120, "dropped": {"empty": 26},
    "tokens": 900, "temperature": 0.0, "prompts": 94, "imitated": 0, "mean_log_prob": -0.1, "samples": 94,
    "distilled": False,
}  # fmt: skip
TABLE = {"similarity": torch.tensor([[0.8, 0.1, 0.2], [0.3, float("nan"), 0.9]])}


class Page(HTMLParser):
    """What tests ask of a page."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def accessible(page: Page) -> None:
    """What can be told of accessibility without a browser."""
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(below <= above + 1 for above, below in pairwise(levels)), "no level is skipped"
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg.get("aria-label"))
    names = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert all(link["href"][1:] in names for link in page.all("a") if str(link["href"]).startswith("#"))
    assert not page.all("script") or page.all("script") == [{}], "nothing is loaded"
    assert [link["href"] for link in page.all("link")] == ["data:,"] and page.all("img") == []


def test_a_start_that_no_learning_rate_improved() -> None:
    """It is kept without a step, so there is no loss to show."""
    made = record()
    for run in ("finetune", "control"):
        made = made.model_copy(update={run: getattr(made, run).model_copy(update={"losses": [], "steps": 0})})
        page = Page(render(made, TABLE))
        accessible(page)
        assert "kept as it began, for no learning rate did better" in page.text


def test_every_section_says_what_it_is_for() -> None:
    page = Page(render(record(), TABLE))
    accessible(page)
    assert [s["id"] for s in page.all("section")] == list(SECTIONS)
    said = page.text
    for words in (
        "Needs fine-tuning", "share of the lead kept", "gain over the bare new base", "right before and wrong now",
        "90 %", "Bits per byte", "boolq", "18 that the old base with its adapter got right are wrong now",
        "functional", "diverged", "none (bare new base)", "learning rate 0.01", "CKA of each of 2 old layers",
        "1 → 2", "mean over modules", "Over 512 aligned positions", "no gate projection",
        "DoRA is not supported", "cached", "finetune migrated", "lorasuite migrate --adapter org/mirror",
        "1" * 64, "torch 2.13.0", "the chat template differs", "new layers 1 have no partner",
    ):  # fmt: skip
        assert words in said, words
    assert NASTY.split(">")[1].split("(")[0] in said and not page.all("script"), "text is text"
    assert said.index("Needs fine-tuning") < said.index("The gate"), "the verdict comes first"


def test_what_there_is_nothing_of_is_said() -> None:
    bare = record(
        candidates=[], finetune=None, control=None, evaluation={}, tasks={}, comparisons=[], dropped=[], notices=[],
        layer_similarity={}, head_map={}, alignment=None, serving={}, command="", method="lorasuite",
        retained_energy={"model.layers.0.mlp.up_proj": 1.0}, transfer_matrix={"identity": True},
        verdict={"verdict": "unmeasured", "reason": "no held-out rows"},
    )  # fmt: skip
    page = Page(render(bare, {}))
    accessible(page)
    assert [s["id"] for s in page.all("section")] == list(SECTIONS)
    for words in (
        "Not measured", "nothing was measured", "flips need", "--method auto", "not fine-tuned", "no similarities",
        "No heads were matched", "loses nothing", "the transfer matrix is the identity", "lorasuite did not",
    ):  # fmt: skip
        assert words in page.text, words


def test_what_adapters_cost_of_general_ability() -> None:
    arms = {"old": 1.0, "old+adapter": 1.1, "new": 0.9, "migrated+lft": 1.2}
    numbers = {"arm": "migrated+lft", "n": 64, "old": 0.1, "new": 0.3, "excess": 0.2}
    general = {
        "source": "64 texts of general_texts",
        "missing": ["perplexing: it has no accuracy"],
        "text": {arm: scored(bits=bits) for arm, bits in arms.items()},
        "tasks": {arm: boolq(bits / 2) for arm, bits in arms.items()},
        "costs": [
            {"task": None, "metric": "bits_per_byte", "interval": (0.15, 0.25), **numbers},
            {"task": "boolq", "metric": "acc,none", "interval": None, **numbers},
        ],
    }
    made = record(general=general)
    cells = general_costs(made.general)
    assert cells[0] == [
        "general text, bits per byte", "1.000", "1.100", "0.100", "0.900", "1.200", "0.300",
        "0.200 (0.150 to 0.250)", "64",
    ]  # fmt: skip
    assert cells[1][:4] == ["boolq, acc", "50\xa0%", "55\xa0%", "10\xa0%"]
    made = made.model_copy(update={"verdict": made.judge(Gate(max_general_loss=0.1))})
    page = Page(render(made, {}))
    accessible(page)
    for words in ("on 64 texts of general_texts", "0.200 (0.150 to 0.250)",
                  "Not measured: perplexing: it has no accuracy.",
                  "bits per byte of general text lost beyond what the old adapter cost, at most"):  # fmt: skip
        assert words in page.text, words
    assert "| general text, bits per byte | 1.000 | 1.100 |" in model_card(made)


def test_a_record_of_an_earlier_version(tmp_path: Path) -> None:
    """Without the keys that were not there yet."""
    gone = ("comparisons", "serving", "head_similarity", "alignment")
    old = {key: value for key, value in content().items() if key not in gone}
    old["verdict"] = {k: v for k, v in old["verdict"].items() if k not in ("checks", "kept_interval", "task")}
    (tmp_path / "migration.json").write_text(json.dumps(old))
    accessible(Page(write_report(tmp_path).read_text()))


def test_rows_of_the_old_adapter() -> None:
    said = Page(render(record(teacher=TEACHER), TABLE)).text
    assert "rows 94" in said and "100 samples, 94 of them written by the old base with the adapter" in said


def test_many_heads_and_layers() -> None:
    heads = {f"{n}->{n}": {str(a): a for a in range(32)} for n in range(40)}
    layers = {str(n): n + n // 4 for n in range(40)}
    page = Page(render(record(head_map=heads, layer_map=layers), {"similarity": torch.rand(40, 52)}))
    accessible(page)
    assert "31→31" in page.text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def mixed(over: str, under: str, share: float) -> str:
    pairs = [(int(over[i : i + 2], 16), int(under[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def test_contrast_of_text_is_aa_in_light_dark_and_print() -> None:
    style = render(record(), TABLE).split("<style>")[1].split("</style>")[0]
    schemes = [
        dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", block)) for block in re.findall(r":root {(.*?)}", style, re.S)
    ]
    assert len(schemes) == 3
    for scheme in (schemes[0] | over for over in schemes):
        page = scheme["page"]
        pairs = {name: (scheme[name], page) for name in ("ink", "soft", "link", "good", "fair", "poor", "none")} | {
            f"{tone} on its panel": (scheme[tone], scheme[f"{tone}-page"]) for tone in ("good", "fair", "poor", "none")
        }
        pairs |= {
            f"ink on {tone}": (scheme["ink"], scheme[f"{tone}-page"]) for tone in ("good", "fair", "poor", "none")
        }
        pairs["ink on code"] = (scheme["ink"], scheme["panel"])
        pairs["number on the path"] = (scheme["on-chosen"], scheme["chosen"])
        pairs["number on the darkest cell"] = (scheme["ink"], mixed(scheme["heat"], page, 0.7))
        for name, (front, back) in pairs.items():
            assert contrast(front, back) >= 4.5, (name, front, back, contrast(front, back))
        for line in ("one", "two"):  # lines and dots: 3 to 1
            assert contrast(scheme[line], page) >= 3


def test_figures_bear_odd_numbers() -> None:
    nan = float("nan")
    assert "begins at" in figures.curves({"<a>": [(1, 2.0), (2, nan), (3, 1.0)]}, "step", "loss")
    assert "&lt;a&gt;" in figures.curves({"<a>": [(1, 2.0)]}, "step", "loss")
    figures.curves({"a": [(1, nan)]}, "step", "loss")
    figures.columns({}, "x", "y")
    figures.heat_map(torch.full((2, 2), nan), {0: 0})
    figures.meter(-3.0, -4.0, 2.0, [0.2, 0.9])
    figures.whisker(0.0, None, None, (0.0, 0.0))


def test_intervals_of_none_and_all() -> None:
    assert wilson(0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert wilson(1, 100) == pytest.approx((0.9630, 1), abs=1e-4)


def row(name: str, verdict: str, kept: float | None, report: Path | None) -> dict[str, Any]:
    return {
        "name": name, "pair": "old → new", "verdict": verdict, "reason": NASTY, "kept": kept, "kept_interval": None,
        "cached": False, "seconds": 3.0, "retry": None, "output": "x", "adapter": "a",
        "report": None if report is None else str(report),
    }  # fmt: skip


def test_a_fleet(tmp_path: Path) -> None:
    rows = [row("b", "retrain", 0.1, tmp_path / "new" / "b" / "report.html"), row("a", "ship", 1.0, None)]
    page = write_fleet(tmp_path, {"adapters": rows}, "fleet.yaml")
    read = Page(page.read_text())
    accessible(read)
    assert "new/b/report.html" in [link["href"] for link in read.all("a")]
    assert read.text.index("Ship") < read.text.index("Retrain")
    # a later run of some adapters leaves the others in the table
    write_fleet(tmp_path, {"adapters": [row("c", "failed", None, None), row("b", "ship", 1.0, None)]})
    said = Page(page.read_text()).text
    assert "3 adapters" in said and "Retrain" not in said
    before = page.read_text()
    page.unlink()
    assert write_report(tmp_path).read_text() == before
    with pytest.raises(CheckpointError, match="of a migration or of a fleet"):
        write_report(tmp_path / "new")


def test_only_a_transform_that_does_not_read_the_head_maps_is_said_not_to() -> None:
    for method, said in {"functional": True, "lorasuite": False, "of another package": False, "none": False}.items():
        page = Page(render(record(method=method), TABLE)).text
        assert (f"The method used ({method}) does not read it" in page) == said, method


def test_addresses_of_reports_are_no_scripts(tmp_path: Path) -> None:
    hostile = ["javascript:alert(1)", "new/a b#c?d%/\"'><script>/report.html", "//elsewhere.example/report.html"]
    rows = [row(str(n), "ship", 1.0, None) | {"report": report} for n, report in enumerate(hostile)]
    (tmp_path / "fleet.json").write_text(json.dumps({"fleet": None, "adapters": rows}))
    links = [tag["href"] for tag in Page(write_report(tmp_path).read_text()).all("a") if "#" not in str(tag["href"])]
    for link, wanted in zip(links, hostile, strict=True):
        parts = urlsplit(str(link))
        assert not parts.scheme and not parts.netloc and unquote(parts.path) == wanted.lstrip("/")


def test_the_policy_allows_a_pages_own_blocks_alone(tmp_path: Path) -> None:
    pages = [render(record(), TABLE)]
    pages.append(write_fleet(tmp_path, {"adapters": [row("a", "ship", 1.0, None)]}, "fleet.yaml").read_text())
    for page in pages:
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
        assert "unsafe-inline" not in policy and "unsafe-eval" not in policy
        blocks = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.DOTALL)
        for text in [*blocks, *re.findall(r' style="([^"]*)"', page)]:
            assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert "script-src 'sha256-" in pages[1]
