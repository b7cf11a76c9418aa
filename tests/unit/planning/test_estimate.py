"""The cost model: what is counted, what it says does not fit, and what a run is refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasuite.bases import Checkpoint
from lorasuite.errors import PreflightError
from lorasuite.planning import (
    Machine,
    MigrationConfig,
    Ops,
    Shape,
    Throughput,
    Work,
    _counting,
    active,
    adapter_costs,
    check,
    estimate,
    measure,
    pair_costs,
    shortages,
    survey,
    unfit,
)
from lorasuite.planning._inspection import Inspection
from lorasuite.planning._machine import in_dtype
from tests import kinds, models

SPEED = Throughput("cpu", *[1e6] * 7)
ROOMY = Machine(2**50, 2**50, None, None, 2**50)
ALL = ("copy", "functional", "lorasuite", "procrustes", "sequential")
BUSY = Work(
    methods=ALL, texts=64, text_tokens=32, rows=100, row_tokens=40, label_tokens=8, chosen_by=20, teacher_rows=300,
    teacher_tokens=8, evaluation_rows=50, fitted_rows=64,
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
def test_active_weights(family: str, base: Callable[..., Path]) -> None:
    """Every matrix but the input embedding, unless it is the output one too; half of two experts."""
    model = models.load(base(family))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    expected = head.numel()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter is not embedding and parameter is not head:
            expected += parameter.numel() // (2 if "experts" in name else 1)
    assert active(Checkpoint(base(family))) == expected


def test_a_shape_is_the_same_from_headers_and_from_the_configuration(base: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(base("llama"))
    found = Shape.of(checkpoint)
    expected = Shape.configured(checkpoint.architecture, checkpoint.config, found.stored)
    norms = found.total - expected.total
    assert 0 < norms <= (2 * found.dims.layers + 1) * found.dims.hidden_size
    assert replace(found, total=0, stored=0) == replace(expected, total=0, stored=0)


def shapes(base: Callable[..., Path]) -> tuple[Shape, Shape]:
    return Shape.of(Checkpoint(base("llama"))), Shape.of(Checkpoint(base("llama", hidden=48, seed=1)))


def stages(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in found["stages"]}


def test_every_stage_that_has_work_is_counted(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    found = estimate(old, new, BUSY, ROOMY, SPEED)
    assert list(stages(found)) == [
        "fingerprint", "vocabulary", "transfer_matrices", "mlp_factors", "activations", "similarity", "head_mapping",
        "alignment", "state_map", "transform", "template_fit", "teacher", "teacher_worth", "model_fit", "select",
        "finetune", "evaluate", "serving",
    ]  # fmt: skip
    assert found["total"]["seconds"] == pytest.approx(sum(row["seconds"] for row in found["stages"]))
    assert all(row["seconds"] > 0 and row["ram_bytes"] > 0 for row in found["stages"])
    assert json.loads(json.dumps(found)) == found
    # what nothing asks for is not there
    plain = stages(estimate(old, new, Work(methods=("lorasuite",)), ROOMY))
    assert not {"alignment", "state_map", "activations", "teacher", "finetune", "evaluate"} & set(plain)
    assert plain["mlp_factors"]["seconds"] is None
    assert "mlp_factors" not in stages(estimate(old, new, Work(methods=("procrustes",)), ROOMY))


def test_experts_and_templates_are_counted_where_there_are_some(base: Callable[..., Path]) -> None:
    old, new = Shape.of(Checkpoint(base("olmoe"))), Shape.of(Checkpoint(base("olmoe", hidden=48, seed=1)))
    assert old.experts == (3, 2, 48)
    work = replace(BUSY, experts=True)
    found = stages(estimate(old, new, work, ROOMY, SPEED))["expert_maps"]
    assert found["seconds"] > 0 and found["disk_bytes"] > 3 * 2 * 48 * 48
    assert "expert_maps" not in stages(estimate(old, new, BUSY, ROOMY))
    assert "expert_maps" not in stages(estimate(*shapes(base), work, ROOMY))
    assert "template_fit" not in stages(estimate(old, new, replace(work, fitted_rows=0), ROOMY))


def ops(costs: list[Any], stage: str) -> Ops:
    return sum((one.ops for one in costs if one.stage == stage), Ops())


def test_counts_follow_tokens_rows_and_rank(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    pair, own = pair_costs(old, new, BUSY), adapter_costs(old, new, BUSY)
    d, layers = old.dims.hidden_size, old.dims.layers
    # one pass of each base: two operations a weight and token, attention, and no head
    tokens = 64 * 32
    expected = sum(tokens * (2 * s.active + 4 * 32 * s.dims.hidden_size * s.dims.layers) for s in (old, new))
    assert ops(pair, "activations").forward == pytest.approx(expected)
    more = pair_costs(old, new, replace(BUSY, texts=128))
    assert ops(more, "activations").forward == pytest.approx(2 * expected)
    assert ops(more, "head_mapping") == ops(pair, "head_mapping")
    # frozen weights: four operations a weight, and not six, and the head at labels alone
    n, rank = new.dims, BUSY.rank
    factors = rank * n.layers * (4 * 2 * n.hidden_size + 3 * (n.hidden_size + n.intermediate_size))
    step = 40 * (4 * new.active + 2 * 4 * 40 * n.hidden_size * n.layers + 6 * factors) + 4 * 8 * new.head
    assert ops(own, "finetune").trained == pytest.approx(1.7 * 100 * 3 * step) and not ops(own, "finetune").forward
    assert ops(adapter_costs(old, new, replace(BUSY, fine_tunes=2.5)), "finetune").trained == pytest.approx(
        2.5 * ops(own, "finetune").trained
    )
    # a search and its control, or short fine-tunes before whole ones, are stages of their own, as they run
    searching = adapter_costs(old, new, replace(BUSY, searched=2.5, fine_tunes=0))
    assert [c.stage for c in searching if c.stage in ("screen", "search", "finetune")] == ["search"]
    assert ops(searching, "search").trained == pytest.approx(2.5 * ops(own, "finetune").trained)
    screening = [c.stage for c in adapter_costs(old, new, replace(BUSY, screened=0.5))]
    assert screening.index("screen") == screening.index("finetune") - 1
    # equal hidden sizes need no map
    assert ops(pair_costs(old, old, BUSY), "transfer_matrices") == Ops()
    assert next(c.disk for c in pair if c.stage == "mlp_factors") == 3 * layers * 2 * d * d
    loha = adapter_costs(old, new, replace(BUSY, dense=((32, 32), (32, 48))))
    assert ops(loha, "read_adapter").svd == 32**3 + 32**2 * 48


def test_memory_lies_where_models_run(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    cpu, gpu = (stages(estimate(old, new, replace(BUSY, gpu=g), ROOMY)) for g in (False, True))
    assert all(row["gpu_bytes"] == 0 for row in cpu.values())
    for stage in ("finetune", "teacher", "evaluate", "alignment"):
        assert gpu[stage]["gpu_bytes"] > 0 and gpu[stage]["ram_bytes"] < cpu[stage]["ram_bytes"]


def test_what_does_not_fit_is_named_with_a_remedy(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    found = estimate(
        old, new, replace(BUSY, gpu=True, micro_batch=16), replace(ROOMY, gpu=2**20, gpu_free=2**19, disk_free=10)
    )
    what = {(one["stage"], one["what"]) for one in shortages(found)}
    assert ("finetune", "GPU memory") in what and any(name == "disk" for _, name in what)
    assert all(one["need"] > one["have"] and one["remedy"] for one in shortages(found))
    problems = unfit(found)
    assert any("--finetune-micro-batch-size" in problem.remedy for problem in problems)
    assert any("LORASUITE_HOME" in problem.remedy for problem in problems)
    # rows of a pass that are not named adapt to the memory there is
    fixed, free = (estimate(old, new, replace(BUSY, micro_batch=n), ROOMY) for n in (16, None))
    other = 4 * old.total  # the old base may be dropped
    assert stages(free)["finetune"]["spare_bytes"] > other == stages(fixed)["finetune"]["spare_bytes"]
    # where activations are never recomputed, one row with all of its own is the least
    kept, may, always = (
        stages(estimate(old, new, replace(BUSY, checkpointing=told), ROOMY))["finetune"] for told in (False, None, True)
    )
    assert kept["ram_bytes"] == may["ram_bytes"] > always["ram_bytes"]
    least = [row["ram_bytes"] - row["spare_bytes"] for row in (kept, may, always)]
    assert least[0] > least[1] == least[2]
    # tight now, and not refused: what is in use may be freed
    need = max(row["ram_bytes"] for row in found["stages"])
    tight = estimate(old, new, BUSY, replace(ROOMY, ram=need, ram_free=need // 2))
    assert shortages(tight) and not unfit(tight)
    # nor what may lie in the store already
    cached = estimate(old, new, BUSY, replace(ROOMY, disk_free=10, disk_stored=found["total"]["disk_bytes"]))
    assert shortages(cached) and not unfit(cached)


def test_both_bases_stay_loaded_where_half_of_the_memory_holds_them(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    both = 4.0 * (old.total + new.total)
    wide = stages(estimate(old, new, BUSY, ROOMY))
    narrow = stages(estimate(old, new, BUSY, replace(ROOMY, ram=int(2 * both) - 8)))
    for name in ("teacher_worth", "finetune", "evaluate"):
        kept = wide[name]["ram_bytes"] - narrow[name]["ram_bytes"]
        assert kept == wide[name]["spare_bytes"] - narrow[name]["spare_bytes"] == 4 * old.total
    assert wide["teacher"] == narrow["teacher"]  # only the old base has been run
    # without a teacher the old one is not there before the evaluation
    labelled = [stages(estimate(old, new, replace(BUSY, teacher_rows=0), ROOMY))["finetune"], narrow["finetune"]]
    assert labelled[0]["ram_bytes"] == labelled[1]["ram_bytes"]
    on_gpu = replace(BUSY, gpu=True)
    gpu = stages(estimate(old, new, on_gpu, replace(ROOMY, gpu=2**50, gpu_free=2**50)))["finetune"]
    without = stages(estimate(old, new, on_gpu, replace(ROOMY, gpu=0, gpu_free=0)))["finetune"]
    assert gpu["gpu_bytes"] - without["gpu_bytes"] == 4 * old.total and gpu["ram_bytes"] == without["ram_bytes"]


def test_texts_of_the_bases_own_are_read_by_whole_fine_tunes(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    tuned = replace(BUSY, searched=2.5, fine_tunes=2.0, screened=1.0)
    without, beside = (
        {cost.stage: cost.ops for cost in adapter_costs(old, new, work)}
        for work in (tuned, replace(tuned, rehearsal=13))
    )
    assert beside.keys() - without.keys() == {"rehearsal"} and beside["rehearsal"].streamed > 0
    more = {name: beside[name].trained - without[name].trained for name in ("screen", "search", "finetune")}
    assert more["screen"] == 0 < more["search"]  # its last run alone
    assert more["finetune"] == pytest.approx(2 * more["search"])
    # less than as many rows of as many labels
    assert more["search"] < 13 / tuned.rows * without["search"].trained / 2.5
    assert "rehearsal" not in {cost.stage for cost in adapter_costs(old, new, replace(tuned, rows=0, rehearsal=0))}


def test_a_fine_tune_that_keeps_its_activations_is_refused_where_one_row_does_not_fit(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, rows = base("llama"), tmp_path / "rows.jsonl"
    text = " ".join(f"w{n}" for n in range(100))
    rows.write_text("".join(json.dumps({"prompt": text, "completion": f" w{n}"}) + "\n" for n in range(20)))

    def settings(told: bool | str) -> MigrationConfig:
        return config(
            old, old, lora(old), tmp_path / "out", train_data=str(rows), pair={"cka_batch": 4}, device="cpu",
            finetune={"gradient_checkpointing": told},
        )  # fmt: skip

    def least(told: bool | str) -> int:
        search = stages(check(settings(told), tmp_path / "home").inspection.cost)["search"]
        size: int = search["ram_bytes"] - search["spare_bytes"]
        return size

    between = (least(False) + least("auto")) // 2
    assert least(True) == least("auto") < between < least(False)
    small = Machine(between, between, None, None, 2**50)
    monkeypatch.setattr(Machine, "here", lambda device, home: small)
    monkeypatch.setattr("lorasuite.planning._estimate.MARGIN", 1.0)
    refused = {}
    for told in (False, "auto"):
        found = survey(settings(told), tmp_path / "home", timed=False)
        refused[told] = [problem.where for problem in unfit(found.cost)]
    assert "search" in refused[False] and "search" not in refused["auto"]


def test_a_base_that_is_spread_has_all_gpus_and_the_ram(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = shapes(base)
    one = Machine(2**50, 2**40, 2**16, 2**15)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**30, 2**31))
    both = one.spreading()
    assert both == replace(one, spread=2**50 + 2**32, spread_free=2**40 + 2**31)
    work = replace(BUSY, gpu=True)
    alone, spread = (estimate(old, new, work, machine) for machine in (one, both))
    refused, left = ({problem.where for problem in unfit(found)} for found in (alone, spread))
    loaded = {"template_fit", "teacher", "teacher_worth", "select", "finetune", "evaluate", "serving"}
    assert loaded <= refused and left == refused - loaded and {"alignment", "model_fit"} <= left
    assert all("--device-map auto" in one.remedy for one in unfit(alone) if one.where in loaded)
    assert not any("--device-map" in one.remedy for one in unfit(spread))
    # both bases are loaded whole for the fit of a model transform, whatever the settings of loading say
    assert [one.remedy for one in unfit(alone) if one.where == "model_fit"] == ["Try --method procrustes."]
    full = estimate(old, new, work, replace(both, spread=2**21, spread_free=2**20))
    (teacher,) = [one for one in shortages(full) if one["stage"] == "teacher"]
    assert teacher["what"] == "GPU memory and RAM" and "--load-in-4bit" in teacher["remedy"]
    assert "--device-map" not in teacher["remedy"]
    assert teacher["need"] == stages(full)["teacher"]["gpu_bytes"] + stages(full)["teacher"]["ram_bytes"]
    settings = config(
        base("llama"), base("llama"), lora(base("llama")), Path("none"), loading={"device_map": "auto"}, device="cpu"
    )  # fmt: skip
    assert any("device_map auto not used" in told for told in survey(settings, tmp_path, timed=False).notices)


def test_weights_take_what_the_settings_say(base: Callable[..., Path], tmp_path: Path) -> None:
    old, new = base("llama"), base("llama", hidden=48, seed=1)
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        settings = config(old, new, Path("none"), Path("none"), loading={"dtype": dtype})
        found = survey(settings, tmp_path, adapter=False, timed=False)
        sizes[dtype] = stages(found.cost)["serving"]["ram_bytes"]
    total = Shape.of(Checkpoint(new)).total
    assert sizes["float32"] - sizes["bfloat16"] >= 2 * total


def config(old: Path, new: Path, adapter: Path, output: Path, **more: Any) -> MigrationConfig:
    return MigrationConfig(old_base=str(old), new_base=str(new), adapter=str(adapter), output=str(output), **more)


def test_a_run_that_cannot_fit_is_refused(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = base("llama"), base("llama", hidden=48, seed=1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": " w1"}) + "\n" for n in range(20)))
    settings = config(old, new, lora(old), tmp_path / "out", train_data=str(rows), pair={"cka_batch": 4})
    assert check(settings, tmp_path / "home").inspection.cost["stages"]
    small = Machine(2**30, 2**29, None, None, 2**10)
    monkeypatch.setattr(Machine, "here", lambda device, home: small)
    with pytest.raises(PreflightError, match="disk") as refused:
        check(settings, tmp_path / "home")
    assert any("LORASUITE_HOME" in problem.remedy for problem in refused.value.problems)


def test_a_base_that_is_loaded_whole_is_counted_whole(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture of experts, whose parameters transformers makes of several tensors."""

    def asked(old: Path) -> Inspection:
        return survey(config(old, old, Path("none"), Path("none")), tmp_path, False, pair_only=True, timed=False)

    dense, mixture = base("llama"), base("mixtral", layers=8)
    whole = asked(mixture)
    said = "is loaded whole where the texts are read"
    assert [str(mixture) in notice for notice in whole.notices if said in notice] == [True]
    assert not any(said in notice for notice in asked(dense).notices)
    monkeypatch.setattr(_counting, "unstreamed", lambda *_: None)
    by_block, shape = asked(mixture), Shape.of(Checkpoint(mixture))
    for stage, bases in {"activations": 1, "alignment": 2, "state_map": 1}.items():
        more = stages(whole.cost)[stage]["ram_bytes"] - stages(by_block.cost)[stage]["ram_bytes"]
        assert more == pytest.approx(bases * 4 * (shape.total - shape.block), abs=2)


def test_survey_reads_the_data_there_is_and_says_what_it_assumes(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    old, new = base("llama"), base("llama", hidden=48, seed=1)
    bare = survey(config(old, new, Path("none"), Path("none")), tmp_path, adapter=False)
    assert not bare.problems and len(bare.cost["assumed"]) == 3
    # with rows to train on, as are assumed, no transform is tried between bases of different widths
    assert {"unmoved", "search", "select"} <= set(stages(bare.cost))
    unused = {"alignment", "state_map", "mlp_factors", "transform", "model_fit", "teacher"}
    assert not unused & set(stages(bare.cost))
    alone = survey(config(old, new, lora(old), Path("none"), teacher_samples=0), tmp_path, timed=False)
    assert {"alignment", "state_map", "transform", "model_fit"} <= set(stages(alone.cost))
    assert not {"search", "finetune"} & set(stages(alone.cost))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": " w1"}) + "\n" for n in range(40)))
    known = survey(config(old, new, lora(old), Path("none"), train_data=str(rows)), tmp_path)
    assert not known.cost["assumed"]
    short, full = (stages(one.cost)["search"] for one in (known, bare))
    assert short["ram_bytes"] < full["ram_bytes"]  # short rows instead of the cut-off
    asked = survey(config(old, new, lora(old), Path("none"), prompts=str(rows), calibration=str(rows)), tmp_path)
    assert asked.cost["assumed"] == ["written answers of 32 tokens"]
    assert stages(asked.cost)["search"]["ram_bytes"] < full["ram_bytes"]
    untimed = survey(config(old, new, lora(old), Path("none")), tmp_path, timed=False)
    assert untimed.cost["measured"] is None and untimed.cost["total"]["seconds"] is None
    pair = survey(config(old, new, Path("none"), Path("none")), tmp_path, adapter=False, pair_only=True, timed=False)
    assert "alignment" in stages(pair.cost) and "search" not in stages(pair.cost)


def test_what_a_fine_tune_needs_is_asked_before_whatever_the_dtype(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = base("llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": " w1"}) + "\n" for n in range(20)))
    monkeypatch.setattr("lorasuite.training._device.find_spec", lambda name: None)
    given = {"finetune": {"report_to": "wandb", "liger": True}, "pair": {"cka_batch": 4}}
    for dtype in ("auto", "bfloat16"):
        tuned = config(
            old, old, lora(old), tmp_path / "out", train_data=str(rows), loading={"dtype": dtype}, **given
        )  # fmt: skip
        with pytest.raises(PreflightError) as refused:
            check(tuned, tmp_path / "home")
        said = [problem.where for problem in refused.value.problems]
        assert said == ["finetune.liger", "finetune.liger", "finetune.report_to wandb"]
        assert [problem.where for problem in survey(tuned, tmp_path, timed=False).problems] == said
    # without rows there is none, and none is counted
    plain = check(config(old, old, lora(old), tmp_path / "out", method="copy", **given), tmp_path / "home")
    assert not {"search", "finetune"} & set(stages(plain.inspection.cost))


@pytest.mark.parametrize(("given", "counted"), [({}, False), ({"candidates": ["lorasuite"]}, True)])
def test_a_control_is_counted_where_it_is_a_run_of_its_own(
    given: dict[str, Any], counted: bool, base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """With no transform tried, the fresh LoRA that is published is what it would be compared with."""
    old, new, rows = base("llama"), base("llama", hidden=48, seed=1), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": " w1"}) + "\n" for n in range(20)))
    told = {"train_data": str(rows), "eval_data": str(rows), "device": "cpu", **given}
    found = stages(survey(config(old, new, lora(old), Path("none"), **told), tmp_path, timed=False).cost)
    assert "search" in found and ("finetune" in found) == counted


def test_what_no_factors_are_stored_of_is_counted(base: Callable[..., Path], tmp_path: Path) -> None:
    old = Path(base("llama"))
    loha = kinds.build(kinds.MIGRATED["LoHa"], tmp_path / "a", old)
    found = survey(config(old, old, loha, Path("none")), tmp_path, timed=False)
    assert stages(found.cost)["read_adapter"]["ram_bytes"] > 0


def test_a_machine_is_measured(base: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(base("llama"))
    speed = measure(checkpoint.dims, checkpoint.weight_files[0], size=32)
    assert min(speed.forward, speed.single, speed.double, speed.eigen, speed.svd, speed.read, speed.streamed) > 0
    assert speed.trained > 0
    here = Machine.here("cpu", tmp_path / "not" / "there")
    assert 0 < here.ram_free <= here.ram and here.disk_free and here.gpu is None
    other = in_dtype(speed, checkpoint.dims, torch.bfloat16, size=32)
    assert min(other.forward, other.streamed, other.trained) > 0 and other == replace(
        speed, forward=other.forward, streamed=other.streamed, trained=other.trained
    )
    assert speed.seconds(Ops(forward=3.0)) == pytest.approx(3 / speed.forward)
    assert speed.seconds(Ops(trained=3.0)) == pytest.approx(3 / speed.trained)
    assert replace(speed, trained=0.0).seconds(Ops(trained=3.0)) == pytest.approx(3 / speed.forward)


def test_stages_that_run_models_take_what_their_dtype_takes(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    slow = {2: replace(SPEED, forward=1e3, streamed=1e3)}
    asked = {"prompt_sources": 1, "synthetic_rows": 300, "soft_labels": True, "second_step": "cached"}
    busy = replace(BUSY, **asked, general_texts=4, general_tokens=9)

    def changed(**items: float) -> set[str]:
        work = replace(busy, **items)
        plain, other = (estimate(old, new, work, ROOMY, SPEED, running=by) for by in ({}, slow))
        return {name for name, row in stages(other).items() if row["seconds"] != stages(plain)[name]["seconds"]}

    run = {
        "template_fit", "teacher", "teacher_worth", "prompt_drafts", "prompts", "soft_labels", "select", "evaluate",
        "general_text", "serving",
    }  # fmt: skip
    assert changed(run_item=2) == run
    assert changed(training_item=2) == {"finetune", "second_step"}
    assert changed() == set()


def test_the_dtypes_that_are_asked_for_are_measured_once(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, rows = base("llama"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": " w1"}) + "\n" for n in range(20)))
    timed: list[torch.dtype] = []

    def slower(speed: Throughput, dims: Any, dtype: torch.dtype) -> Throughput:
        timed.append(dtype)
        return replace(speed, forward=speed.forward / 8, streamed=speed.streamed / 8)

    monkeypatch.setattr("lorasuite.planning._counting.measure", lambda *given: SPEED)
    monkeypatch.setattr("lorasuite.planning._counting.in_dtype", slower)

    def told(**given: Any) -> tuple[list[torch.dtype], list[str], dict[str, dict[str, Any]]]:
        timed.clear()
        settings = config(old, old, lora(old), Path("none"), train_data=str(rows), device="cpu", **given)
        found = survey(settings, tmp_path)
        return [*timed], [notice for notice in found.notices if "slower" in notice], stages(found.cost)

    first = told()
    assert first[:2] == ([], [])
    tuned = told(finetune={"precision": "bf16"})
    said = "8 times slower than float32 on this CPU: it saves memory, not time"
    assert tuned[:2] == ([torch.bfloat16], [f"finetune.precision bf16: measured {said}"])
    named = told(loading={"dtype": "float16"})
    assert named[:2] == ([torch.float16], [f"dtype float16: measured {said}"])
    for stage, (slow_tuned, slow_named) in {"search": (8, 8), "select": (1, 8), "fingerprint": (1, 1)}.items():
        seconds = [found[2][stage]["seconds"] for found in (first, tuned, named)]
        assert seconds[1:] == pytest.approx([slow_tuned * seconds[0], slow_named * seconds[0]])


def test_where_no_transform_is_tried_a_fresh_lora_is_drawn_and_the_bare_base_scored(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    none = adapter_costs(old, new, replace(BUSY, methods=()))
    one, five = (adapter_costs(old, new, replace(BUSY, methods=ALL[:n])) for n in (1, 5))
    passes = [ops(costs, "select").forward / ops(none, "select").forward for costs in (none, one, five)]
    assert passes == pytest.approx([1, 7, 11])  # bare; and each candidate, and five more scales of the best
    drawn = next(cost for cost in none if cost.stage == "unmoved")
    assert drawn.disk > 0 and "unmoved" not in {cost.stage for cost in one}
    named = adapter_costs(old, new, replace(BUSY, methods=("lorasuite",), chosen_by=0))
    assert not {"select", "unmoved"} & {cost.stage for cost in named}


def test_what_the_teacher_is_asked_beside_rows_is_counted(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    work = replace(BUSY, prompt_sources=1, synthetic_rows=300, soft_labels=True, token_weights=True)
    found = stages(estimate(old, new, work, ROOMY, SPEED))
    asked = {"prompt_drafts", "prompts", "soft_labels", "token_weights"}
    assert asked <= set(found) and not asked & set(stages(estimate(old, new, BUSY, ROOMY, SPEED)))
    assert all(found[name]["seconds"] > 0 and found[name]["ram_bytes"] > 0 for name in asked)
    # three drafts for each prompt wanted are written and probed: more than the teacher's one answer
    assert found["prompt_drafts"]["seconds"] > 3 * max(found[name]["seconds"] for name in ("teacher", "prompts"))
    two = stages(estimate(old, new, replace(work, prompt_sources=2), ROOMY, SPEED))
    assert two["prompt_drafts"]["seconds"] == pytest.approx(2 * found["prompt_drafts"]["seconds"])
    # more is written where examples are long; short ones ask for no more than lists of which there is none
    for tokens, more in ((40, 1.0), (500, 1.5)):
        plain = replace(work, row_tokens=tokens)
        alone, like = (
            ops(adapter_costs(old, new, one), "prompt_drafts") for one in (plain, replace(plain, examples=True))
        )
        assert like.forward >= more * alone.forward and (more > 1 or like == alone)
    # 32 outcomes of eight bytes a token, and what they are of
    assert found["soft_labels"]["disk_bytes"] == 100 * 40 * (32 * 8 + 16)
    assert ops(adapter_costs(old, new, work), "soft_labels").forward * 6 == pytest.approx(
        ops(adapter_costs(old, new, work), "token_weights").forward
    )  # one pass over 100 rows, two over 300
    # where nothing is trained on what it wrote, it is asked no more
    unused = stages(estimate(old, new, replace(work, synthetic_rows=0, second_step="cached"), ROOMY))
    assert not {"soft_labels", "token_weights", "second_step"} & set(unused)


def test_the_second_step_is_a_stage_of_its_own(base: Callable[..., Path]) -> None:
    old, new = shapes(base)
    work = replace(BUSY, rows=300, synthetic_rows=300, second_step_epochs=3, epochs=3, chosen_by=60)
    costs = {kind: adapter_costs(old, new, replace(work, second_step=kind)) for kind in ("none", "cached", "on-policy")}
    assert ops(costs["none"], "second_step") == Ops()
    whole = ops(costs["none"], "finetune").trained
    cached, live = (
        ops(costs[kind], "second_step").trained + ops(costs[kind], "second_step").forward
        for kind in ("cached", "on-policy")
    )
    assert 3 * whole < cached < live  # the first step again, and the second twice; on-policy the student writes
    assert {ops(found, "finetune") for found in costs.values()} == {ops(costs["none"], "finetune")}
    first, second = (next(c for c in costs["cached"] if c.stage == name) for name in ("finetune", "second_step"))
    assert second.ram - first.ram > 4 * old.total  # both bases are loaded
    small = estimate(old, new, replace(work, second_step="cached", micro_batch=16), replace(ROOMY, ram=1, ram_free=1))
    assert any("--second-step none" in problem.remedy for problem in unfit(small) if problem.where == "second_step")


def test_survey_counts_what_the_settings_ask_the_teacher(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    old, new = base("llama"), base("llama", hidden=48, seed=1)
    rows, texts = tmp_path / "rows.jsonl", tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": " w1"}) + "\n" for n in range(8)))
    texts.write_text("".join(json.dumps({"text": f"w{n} w{n + 1} w3"}) + "\n" for n in range(60)))
    given = config(
        old, new, lora(old), tmp_path / "out", prompts=str(rows), calibration=str(texts), second_step="cached",
        finetune={"distillation": 0.5}, pair={"calibration_samples": 16},
    )  # fmt: skip
    found = stages(survey(given, tmp_path, timed=False).cost)
    # eight prompts are examples to find more by; no transform fits; of 60 texts 44 are spare
    assert {"prompt_drafts", "prompts", "soft_labels", "second_step", "unmoved", "select", "general_text"} <= set(found)
    assert not {"transform", "model_fit", "alignment", "state_map"} & set(found)
    plain = {"prompts": str(rows), "calibration": str(texts), "teacher_samples": 0, "method": "procrustes"}
    found = stages(survey(config(old, new, lora(old), tmp_path / "out", **plain), tmp_path, timed=False).cost)
    assert not {"prompt_drafts", "unmoved", "select", "general_text", "second_step"} & set(found)
