"""Fine-tuning tiny models: determinism, accumulation, interruption, and no silent no-ops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lorasuite.adapters import Adapter, attach_adapter, detach_adapter, fresh_config, save_adapter, untrained
from lorasuite.bases import Checkpoint
from lorasuite.data import IGNORED, MIN_OWN_HOLDOUT_ROWS, Row, encode, split_rows
from lorasuite.errors import AdapterError, ConfigError, DataError, NumericalError, OutputError
from lorasuite.training import FinetuneResult, FinetuneSettings, collate, finetune, finetune_swept, validation_loss
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

SETTINGS = FinetuneSettings(batch_size=4, epochs=2, learning_rate=5e-3)


def tune(tmp_path: Path, name: str = "out", settings: FinetuneSettings = SETTINGS, **changes) -> FinetuneResult:
    arguments = {"adapter": None, "lora": tiny_lora(), "output": tmp_path / name, "work_dir": tmp_path / "work"}
    arguments.update(changes)
    rows = arguments.pop("rows", digit_rows())
    base = arguments.pop("base", None) or tiny_model()
    return finetune(base, tiny_tokenizer(), rows, settings, **arguments)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.filterwarnings("error:.*will be removed in v6:FutureWarning")
def test_two_runs_give_the_same_bits_and_a_loadable_adapter(tmp_path, capfd):
    seen = []
    base = tiny_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    first = tune(tmp_path, "a", base=base, validation_rows=digit_rows(3), progress=lambda *args: seen.append(args))
    second = tune(tmp_path, "b")
    assert_equal(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert [entry["loss"] for entry in first.losses] == [entry["loss"] for entry in second.losses]
    assert capfd.readouterr().out == ""

    assert first.steps == 4
    assert first.samples == 8
    assert first.resumed_from is None
    assert [entry["step"] for entry in first.losses] == [1, 2, 3, 4]
    # Linear decay without warm-up: the first step runs at the peak rate.
    assert [entry["learning_rate"] for entry in first.losses] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
    assert first.losses[-1]["loss"] < first.losses[0]["loss"]
    assert [(step, total) for step, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert first.peak_memory_bytes > 0
    json.dumps(first.model_dump())

    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (tmp_path / "work").exists()
    # The caller's model comes back as it was, and the adapter changes what it says.
    assert_equal(dict(base.state_dict()), before)
    assert not any("lora" in name for name, _ in base.named_modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.config.use_cache
    ids = torch.tensor([[1, 3, 6, 12]])
    with torch.no_grad():
        plain = base(ids).logits
        tuned = attach_adapter(base, tmp_path / "a")
        assert not torch.equal(plain, tuned(ids).logits)
        assert first.validation_loss == pytest.approx(
            validation_loss(tuned, tiny_tokenizer(), digit_rows(3), 256, 2), rel=1e-5
        )


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_equals_the_full_batch(tmp_path, micro):
    """Rows differ in length, so a mean of micro-batch means would differ from the mean over tokens."""
    rows = digit_rows(8)
    assert len({len(example["input_ids"]) for example in encode(rows, tiny_tokenizer())}) > 1
    # Adam divides by the gradient's size, so equal updates need equal gradients; a large epsilon would hide nothing.
    full = tune(tmp_path, "full", rows=rows, lora=tiny_lora(init_lora_weights="gaussian"))
    parts = tune(
        tmp_path,
        "parts",
        SETTINGS.model_copy(update={"micro_batch_size": micro}),
        rows=rows,
        lora=tiny_lora(init_lora_weights="gaussian"),
    )
    assert [e["loss"] for e in parts.losses] == pytest.approx([e["loss"] for e in full.losses], abs=1e-5)
    for name, value in tensors(tmp_path / "full").items():
        torch.testing.assert_close(tensors(tmp_path / "parts")[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpoint_steps", [None, 1, 3])
def test_an_interrupted_run_resumes_to_the_same_tensors(tmp_path, checkpoint_steps):
    settings = SETTINGS.model_copy(update={"epochs": 3, "checkpoint_steps": checkpoint_steps})
    lora = {"lora": tiny_lora(lora_dropout=0.1)}  # dropout: the random state must be restored as well
    undisturbed = tune(tmp_path, "whole", settings, work_dir=tmp_path / "other", **lora)

    def interrupt(step: int, total: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    base = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, "resumed", settings, base=base, progress=interrupt, **lora)
    assert not (tmp_path / "resumed").exists()
    assert not any("lora" in name for name, _ in base.named_modules())
    # A checkpoint that was being written when the process died carries no mark and must not be used.
    torn = tmp_path / "work" / "checkpoint-5"
    shutil.copytree(next((tmp_path / "work").glob("checkpoint-*")), torn)
    (torn / "complete.json").unlink()
    (torn / "optimizer.pt").write_bytes(b"half")

    again = tune(tmp_path, "resumed", settings, base=base, **lora)
    assert again.resumed_from == {None: 4, 1: 4, 3: 3}[checkpoint_steps]
    assert again.steps == undisturbed.steps == 6
    assert_equal(tensors(tmp_path / "resumed"), tensors(tmp_path / "whole"))
    assert again.losses == undisturbed.losses


def test_checkpoints_of_another_run_are_not_resumed(tmp_path):
    def interrupt(step: int, total: int, loss: float) -> None:
        if step == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        tune(tmp_path, "a", progress=interrupt)
    assert (tmp_path / "work" / "checkpoint-2" / "complete.json").exists()
    other = tune(tmp_path, "a", SETTINGS.model_copy(update={"learning_rate": 1e-4}))
    assert other.resumed_from is None


def test_a_run_killed_before_its_output_was_written_only_writes_it(tmp_path, monkeypatch):
    whole = tune(tmp_path, "whole", work_dir=tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(
            "lorasuite.training._finetune.save_adapter", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(OSError, match="disk full"):
            tune(tmp_path, "late")
    late = tune(tmp_path, "late")
    assert late.resumed_from == late.steps == 4
    assert late.losses == whole.losses
    assert_equal(tensors(tmp_path / "late"), tensors(tmp_path / "whole"))


PRUNED = {f"model.layers.{n}.self_attn.q_proj.lora_E": [True, n == 0, False, False] for n in range(2)}
ADALORA = AdaLoraConfig(
    init_r=4, target_r=2, total_step=1, rank_pattern=PRUNED, target_modules=["q_proj"], init_lora_weights=False
)


@pytest.mark.parametrize(
    "lora",
    [tiny_lora(init_lora_weights=False), tiny_lora(init_lora_weights=False, use_dora=True), ADALORA],
    ids=["lora", "dora", "adalora"],
)
def test_tuning_starts_from_the_given_adapter(tmp_path, lora):
    torch.manual_seed(1)
    start = get_peft_model(tiny_model(), lora)
    save_adapter(start, tmp_path / "start")
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-9, "max_steps": 1})
    result = tune(tmp_path, "tuned", settings, adapter=tmp_path / "start", lora=None)
    assert result.steps == 1
    # A vanishing learning rate leaves the start in place: the adapter was loaded, not initialised anew.
    for name, value in tensors(tmp_path / "start").items():
        torch.testing.assert_close(tensors(tmp_path / "tuned")[name], value, rtol=0, atol=1e-7)
    changed = tune(tmp_path, "further", adapter=tmp_path / "start", lora=None)
    assert changed.losses[0]["loss"] == pytest.approx(result.losses[0]["loss"], rel=1e-6)
    assert not torch.equal(*(next(iter(tensors(tmp_path / n).values())) for n in ("start", "further")))


def test_gradient_checkpointing_and_base_by_path(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    plain = tune(tmp_path, "plain", base=str(tmp_path / "base"))
    base = tiny_model()
    saving = tune(tmp_path, "saving", SETTINGS.model_copy(update={"gradient_checkpointing": True}), base=base)
    assert [e["loss"] for e in saving.losses] == pytest.approx([e["loss"] for e in plain.losses], abs=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    PeftModel.from_pretrained(tiny_model(), str(tmp_path / "plain"))


def test_a_bad_loss_names_the_step_and_the_remedy(tmp_path):
    base = tiny_model()
    with torch.no_grad():
        base.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"step 1: the loss is nan. Lower the learning rate"):
        tune(tmp_path, base=base)
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="exactly one of adapter and lora"):
        tune(tmp_path, lora=None)
    with pytest.raises(ConfigError, match="exactly one of adapter and lora"):
        tune(tmp_path, adapter=tmp_path)
    with pytest.raises(DataError, match="there are none"):
        tune(tmp_path, rows=[])
    with pytest.raises(DataError, match="keeps any of its completion within 4 tokens"):
        tune(tmp_path, settings=SETTINGS.model_copy(update={"cutoff": 4}))
    with pytest.raises(AdapterError, match="does not fit the base model"):
        tune(tmp_path, lora=tiny_lora(target_modules=["query_key_value"]))
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        tune(tmp_path, adapter=tmp_path, lora=None)
    with pytest.raises(ConfigError, match=r"finetune\.liger: needs a GPU"):
        tune(tmp_path, settings=SETTINGS.model_copy(update={"liger": True}))
    with pytest.raises(ConfigError, match="trackio: is not installed"):
        tune(tmp_path, settings=SETTINGS.model_copy(update={"report_to": "trackio"}))
    with pytest.raises(ConfigError, match="not supported for training"):
        tune(tmp_path, device="meta")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        tune(tmp_path, "there")
    with pytest.raises(ValueError, match="not a multiple of micro_batch_size"):
        FinetuneSettings(micro_batch_size=3)
    with pytest.raises(ValueError, match="Extra inputs"):
        FinetuneSettings(learning=1)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_base_whole(tmp_path):
    save_adapter(get_peft_model(tiny_model(), tiny_lora()), tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_model.safetensors"
    good = load_file(path)
    names = sorted(good)
    cases = [
        ({name: good[name] for name in names[1:]}, r"1 missing tensors, such as .*lora_A"),
        (
            {**good, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
            "1 unexpected tensors",
        ),
        ({**good, "base_model.model.model.embed_tokens.weight": torch.zeros(40, 32)}, "would overwrite 1 tensors"),
        ({name: value[..., :1].contiguous() for name, value in good.items()}, "does not fit the base model"),
    ]
    base = tiny_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for saved, message in cases:
        save_file(saved, path)
        with pytest.raises(AdapterError, match=message):
            attach_adapter(base, tmp_path / "bad")
        assert_equal(dict(base.state_dict()), before)
    path.write_bytes(b"torn")
    with pytest.raises(AdapterError, match="cannot be read"):
        attach_adapter(base, tmp_path / "bad")


def test_an_adapter_with_a_module_of_its_own_is_accepted(tmp_path):
    torch.manual_seed(0)
    own = get_peft_model(tiny_model(), tiny_lora(modules_to_save=["lm_head"]))
    with torch.no_grad():
        own.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    save_adapter(own, tmp_path / "own")
    base = tiny_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.tensor([[1, 3, 6, 12]])
    wrapped = attach_adapter(base, tmp_path / "own").eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, own.eval()(ids).logits)
    assert_equal(dict(detach_adapter(wrapped).state_dict()), before)


def test_validation_loss_is_the_mean_over_tokens():
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), digit_rows(5)
    total, count = 0.0, 0
    for example in encode(rows, tokenizer):
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        for position in range(1, len(labels)):
            if labels[position] != IGNORED:
                total -= float(logp[position - 1, labels[position]])
                count += 1
    assert validation_loss(model, tokenizer, rows, 256, 2) == pytest.approx(total / count, rel=1e-5)
    assert collate(encode(rows, tokenizer))["labels"].shape[0] == 5


def test_adalora_prunes_to_its_budget_and_is_read_whatever_is_left(tmp_path):
    model = tiny_model()
    base = tmp_path / "base"
    model.save_pretrained(base)
    old = Checkpoint(base)
    start = untrained(("q", "v", "up"), old.architecture, kind="adalora", rank=1, scaling=2.0, steps=12)
    settings = SETTINGS.model_copy(update={"epochs": 6})
    tune(tmp_path, settings=settings, base=model, lora=fresh_config(start))
    saved = tensors(tmp_path / "out")
    ranks = [value.shape[1] for name, value in saved.items() if name.endswith("lora_B")]
    assert sum(ranks) == len(ranks) and 0 in ranks and max(ranks) > 1, "one direction a module on average"
    adapter = Adapter.open(tmp_path / "out")
    assert adapter.kind == "ADALORA" and not adapter.check(old)
    norms = [adapter.update(module).norm() for module in adapter.modules]
    assert norms.count(0) == ranks.count(0) and all(update.rank >= 1 for update in adapter.contents.updates.values())


def test_a_run_can_stop_after_some_epochs_of_its_schedule(tmp_path) -> None:
    """Stopped there, it is the whole run up to there; after no epoch it is the start."""
    held_out = digit_rows()[:4]
    whole = tune(tmp_path, "whole", validation_rows=held_out)
    curve = {point["epoch"]: point["loss"] for point in whole.validation}
    assert list(curve) == [0, 1, 2] and curve[2] == whole.validation_loss
    for epochs in (0, 1):
        stopped = tune(tmp_path, f"stopped{epochs}", validation_rows=held_out, stop_after=epochs)
        assert stopped.validation_loss == curve[epochs]
        assert stopped.losses == whole.losses[: len(stopped.losses)] and bool(stopped.losses) == bool(epochs)


def test_a_run_that_is_paused_goes_on_to_the_same_bits(tmp_path) -> None:
    """Within an epoch, at its end, and asked twice for the same pause: then nothing is trained."""
    held_out = digit_rows()[:4]
    whole = tune(tmp_path, "whole", validation_rows=held_out)
    after: dict[int, float | None] = {}
    for step in (1, 2, 2, 3):  # of four, two an epoch
        paused = tune(tmp_path, "never", validation_rows=held_out, work_dir=tmp_path / "paused", pause_at=step)
        assert paused.steps == step and not (tmp_path / "never").exists()
        assert after.setdefault(step, paused.validation_loss) == paused.validation_loss
    assert after[2] == whole.validation[1]["loss"] and len(set(after.values())) == 3
    last = tune(tmp_path, "last", validation_rows=held_out, work_dir=tmp_path / "paused")
    assert (last.resumed_from, last.steps, last.validation_loss) == (3, 4, whole.validation_loss)
    assert_equal(tensors(tmp_path / "last"), tensors(tmp_path / "whole"))
    assert not (tmp_path / "paused").exists()


@pytest.mark.parametrize("helps", [True, False])
def test_a_sweep_is_never_worse_than_its_start(tmp_path, helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not helps:  # every epoch makes the held-out rows worse, whatever the rate
        losses = iter(range(100))
        monkeypatch.setattr("lorasuite.training._finetune.validation_loss", lambda *_: float(next(losses)))
    rows = split_rows(digit_rows(), seed=SETTINGS.seed)
    result, tried = finetune_swept(
        tiny_model(), tiny_tokenizer(), rows, SETTINGS, [1e-3, 5e-3], adapter=None, lora=tiny_lora(),
        output=tmp_path / "swept", work_dir=tmp_path / "work",
    )  # fmt: skip
    assert all(entry.validation_loss <= entry.start_loss for entry in tried)
    assert list(tried[0].model_dump(mode="json")) == ["learning_rate", "validation_loss", "epochs", "start_loss"]
    assert (result.steps > 0) == helps
    if not helps:  # the start, whose B is zero, is written as it is
        assert all(float(t.abs().max()) == 0 for name, t in tensors(tmp_path / "swept").items() if "lora_B" in name)


def test_synthetic_rows_are_judged_by_the_users_rows():
    """With enough of the user's, the same are held out whatever the teacher wrote, and their prompts stay unseen."""
    own = [Row(kind="completion", prompt=f"add {n} =", completion=f" {n + 1}") for n in range(MIN_OWN_HOLDOUT_ROWS)]
    few, both = own[:-1], 2 * MIN_OWN_HOLDOUT_ROWS - 1
    synthetic = [replace(row, completion=" other") for row in own]
    split = split_rows(own, synthetic, seed=3)
    train, held_out = split.to_train, split.to_choose_by
    assert held_out == split_rows(own, seed=3).to_choose_by and len(held_out) == MIN_OWN_HOLDOUT_ROWS // 5
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert len(train) == 2 * len({row.prompt for row in train})
    split = split_rows(few, [], synthetic, seed=3)
    assert all(row.completion != " other" for row in split.to_train)
    assert {row.completion for row in split.to_choose_by} > {" other"}
    assert len(split.to_choose_by) == round(both / 5)
    alone, beside = split_rows(own, seed=3), split_rows(own, [], synthetic, seed=3)
    assert (beside.to_train, beside.to_choose_by) == (alone.to_train, alone.to_choose_by)
    split = split_rows(few, synthetic, seed=3)
    assert len(split.to_train) + len(split.to_choose_by) == both
    assert any(row.completion == " other" for row in split.to_choose_by)
