"""The paper's tasks and others by name, through lm-eval, against plain recomputation."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasuite.adapters import attach_adapter, detach_adapter
from lorasuite.data import Row
from lorasuite.errors import ConfigError, DataError, NumericalError
from lorasuite.evaluation import (
    EvaluationSettings,
    check_tasks,
    compare,
    evaluate_tasks,
    group_score,
    write_task_samples,
)
from lorasuite.evaluation.eval_tasks import GROUPS, TASK_FILES, TASKS, data_file, expand, fingerprint, source
from lorasuite.evaluation.eval_tasks.sources import CONVERT, read
from lorasuite.training import FinetuneSettings, finetune
from tests.integration.tiny import tiny_lora

HERE = Path(__file__).parents[1] / "data"
SAMPLES = HERE / "eval_tasks"
HUB_ROWS = json.loads((HERE / "hub_rows.json").read_text(encoding="utf-8"))
#: LLM-Adapters' own ``dataset/`` directory, where there is one.
REAL = Path(os.environ.get("LLM_ADAPTERS_DATASET", Path(__file__).parents[3] / "shared" / "data" / "tasks"))
SETTINGS = EvaluationSettings(batch_size=3)

needs_real = pytest.mark.skipif(
    not (REAL / "AddSub" / "test.json").is_file(),
    reason="LLM-Adapters' dataset directory is not here (LLM_ADAPTERS_DATASET)",
)


def documents(task: str, eval_dir: Path | None) -> Any:
    """A task's documents as lm-eval has them."""
    metadata = {} if eval_dir is None else {"eval_dir": str(eval_dir)}
    manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)
    loaded = manager.load([task])["tasks"][task]
    return [(loaded.doc_to_text(doc), loaded.doc_to_target(doc)) for doc in loaded.eval_docs]


# ---------------------------------------------------------------------------------------------------- task files


def test_names_groups_and_files_agree() -> None:
    manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False)
    assert len(TASKS) == 15
    assert sorted(manager.all_subtasks) == sorted(TASKS)
    assert sorted(manager.all_groups) == sorted(GROUPS)
    for group, tasks in GROUPS.items():
        assert manager.task_index[group].cfg["task"] == list(tasks)
    assert expand(["lorasuite_math", "arc_easy", "lorasuite_aqua"]) == [*GROUPS["lorasuite_math"], "arc_easy"]
    assert {source(task)["folder"] for task in TASKS} == set(CONVERT) == set(HUB_ROWS)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_loads_from_a_directory_and_from_the_hub(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = source(task)
    local = documents(task, SAMPLES)
    rows = read(data_file(task, SAMPLES))
    assert [(p, a) for p, a in local] == [
        (f"Question: {row['instruction'].strip()}\nAnswer:", row["answer"]) for row in rows
    ]

    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return Dataset.from_list(HUB_ROWS[where["folder"]])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (prompt, answer), *_ = documents(task, None)
    assert prompt == local[0][0]
    assert float(answer) == float(local[0][1]) if where["kind"] == "number" else answer == local[0][1]
    assert asked == [
        ((where["hub"], where.get("config")), {"split": where["split"], "revision": where.get("revision")})
    ]


@needs_real
@pytest.mark.parametrize("task", [task for task in TASKS if task != "lorasuite_hellaswag"])
def test_real_files_give_documents_with_answers(task: str) -> None:
    where = source(task)
    rows = json.loads(data_file(task, REAL).read_text(encoding="utf-8"))
    found = documents(task, REAL)  # refuses answers that are none of the task's
    assert len(found) == len(rows) > 200
    for row in rows[:: len(rows) // 40]:
        raw = _hub_row(where["folder"], row)
        if raw is not None:  # worded from a Hub row as LLM-Adapters worded it
            assert CONVERT[where["folder"]](raw) == {"instruction": row["instruction"], "answer": row["answer"]}


def _hub_row(folder: str, row: dict[str, str]) -> dict[str, Any] | None:
    """What the Hub data set has of a row; None for tasks whose instruction is the question alone."""
    text, answer = row["instruction"], row["answer"]
    number = int(answer[-1]) if answer[-1].isdigit() else 0
    if folder == "AQuA":
        question, _, options = text.partition(" Answer Choices: ")
        named = re.findall(r"\(([A-E])\) (.*?)(?= \([A-E]\) |$)", options)
        return {"question": question, "options": [f"{a}){b}" for a, b in named], "correct": answer}
    if folder == "boolq":
        return {"question": text.split("question: ", 1)[1].rsplit("?\n", 1)[0], "answer": answer == "true"}
    if folder == "piqa":
        found = re.search(r"question: (.*)\n\nSolution1: (.*)\n\nSolution2: (.*)\n\nAnswer format", text, re.DOTALL)
        assert found is not None
        return {"goal": found[1], "sol1": found[2], "sol2": found[3], "label": number - 1}
    stem = {"winogrande": "Option"}.get(folder, "Answer")
    found = re.search(rf"(?:question|sentence): (.*)\n\n{stem}1: (.*?)\s+Answer format", text, re.DOTALL)
    if found is None:
        return None
    choices = re.split(rf" {stem}\d: ", found[2])
    if folder == "social_i_qa":
        context, _, question = found[1].rpartition(" ")
        named = dict(zip(("answerA", "answerB", "answerC"), choices, strict=True))
        return {"context": context, "question": question, "label": str(number), **named}
    if folder == "winogrande":
        return {"sentence": found[1], "option1": choices[0], "option2": choices[1], "answer": str(number)}
    labels = [str(n) for n in range(1, len(choices) + 1)]
    key = "question_stem" if folder == "openbookqa" else "question"
    return {key: found[1], "choices": {"text": choices, "label": labels}, "answerKey": str(number)}


def test_bad_rows_and_names_are_told_at_once(tmp_path: Path) -> None:
    for task, answer in (("lorasuite_gsm8k", "many"), ("lorasuite_aqua", "F"), ("lorasuite_boolq", "yes")):
        file = data_file(task, tmp_path)
        file.parent.mkdir()
        file.write_text(json.dumps([{"instruction": "q", "answer": answer}, {"answer": answer}]))
        with pytest.raises(
            DataError, match=rf"(?s)3 problems.*row 1: its answer '{answer}' is not .*row 2: has no instr"
        ):
            documents(task, tmp_path)
    with pytest.raises(DataError, match=r"AddSub/test.json: does not exist. .* has AQuA, boolq, gsm8k") as caught:
        check_tasks(["lorasuite_math"], tmp_path)
    assert len(caught.value.problems) == 5
    check_tasks(["lorasuite_math", "lorasuite_commonsense"], SAMPLES)
    with pytest.raises(ConfigError, match=r"'lorasuite_gsm9k'.*Did you mean 'lorasuite_gsm8k'"):
        check_tasks(["lorasuite_gsm9k"], SAMPLES)
    (tmp_path / "gsm8k" / "test.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        documents("lorasuite_gsm8k", tmp_path)


def test_fingerprint_follows_rows_and_not_places(tmp_path: Path) -> None:
    task = "lorasuite_addsub"
    here = fingerprint(task, SAMPLES)
    copy = data_file(task, tmp_path)
    copy.parent.mkdir()
    copy.write_bytes(data_file(task, SAMPLES).read_bytes())
    assert fingerprint(task, tmp_path) == here
    copy.write_text(copy.read_text().replace("9 pens", "8 pens", 1))
    assert len({here, fingerprint(task, tmp_path), fingerprint(task, None)}) == 3
    assert fingerprint("lorasuite_singleeq", None) != fingerprint(task, None)


# ---------------------------------------------------------------------------------------------------- evaluating


def _rows(folder: str) -> list[dict[str, str]]:
    return json.loads((SAMPLES / folder / "test.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A tiny base whose tokenizer spells the sample rows, and an adapter that knows about half of them by heart."""
    rows = [*_rows("AddSub"), *_rows("boolq"), *_rows("AQuA")]
    text = " ".join(f"Question: {row['instruction']} Answer: {row['output']}" for row in rows)
    words = ["<s>", "</s>", "<unk>", "Ċ", *dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)
    folder = tmp_path_factory.mktemp("learnt")
    known = [row for n, row in enumerate(rows) if n % 3]
    finetune(
        base,
        tokenizer,
        [Row(kind="completion", prompt=f"Question: {r['instruction'].strip()}\nAnswer:", completion=r["output"])
         for r in known],
        FinetuneSettings(learning_rate=1e-2, batch_size=8, epochs=40, checkpoint_steps=1000),
        adapter=None,
        lora=tiny_lora(r=16),
        output=folder / "adapter",
        work_dir=folder / "work",
    )  # fmt: skip
    return base, tokenizer, folder / "adapter"


def _greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt)["input_ids"]
    written: list[int] = []
    while len(written) < tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == 1:
            break
        written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True)


def test_scores_equal_a_plain_recomputation(learnt: Any, tmp_path: Path, capfd: Any) -> None:
    base, tokenizer, adapter = learnt
    tasks = ["lorasuite_addsub", "lorasuite_boolq", "lorasuite_aqua"]
    seen: list[tuple[str, int, int]] = []
    results = evaluate_tasks(
        base, tokenizer, tasks, SETTINGS, adapters={"base": None, "tuned": adapter}, eval_dir=SAMPLES,
        progress=lambda *args: seen.append(args),
    )  # fmt: skip
    captured = capfd.readouterr()
    assert captured.out == "" and "it/s" not in captured.err
    assert seen[10] == ("base", 11, 11) and seen[-1] == ("tuned", 11, 11)
    assert base.get_input_embeddings().weight.shape[0] == len(tokenizer) and tokenizer.pad_token_id is None

    model = attach_adapter(base, adapter)
    shares = []
    for task, folder in zip(tasks, ("AddSub", "boolq", "AQuA"), strict=True):
        score, rows = results["tuned"][task], _rows(folder)
        assert (score.n, score.batch_size, score.version, score.num_fewshot) == (len(rows), 3, "1.0", 0)
        assert score.generation is not None and score.generation["max_gen_toks"] == (32 if folder == "boolq" else 128)
        right = []
        for row, sample in zip(rows, score.samples, strict=True):
            assert sample.output is not None
            assert sample.prompt == f"Question: {row['instruction'].strip()}\nAnswer:"
            assert sample.target == row["answer"]
            written = _greedy(model, tokenizer, sample.prompt, score.generation["max_gen_toks"])
            assert sample.output.strip() == written.strip()
            # what the output ends in, read as anyone would
            last = re.findall(r"[\d.]*\d|\b[A-E]\b|true|false", written)
            same = bool(last) and (float(last[-1]) == float(row["answer"]) if folder == "AddSub"
                                   else last[-1] == row["answer"])  # fmt: skip
            assert bool(sample.scores["exact_match,answer"]) == same, (written, row["answer"])
            right.append(same)
        mean = sum(right) / len(right)
        assert score.metrics["exact_match,answer"] == pytest.approx(mean)
        spread = sum((r - mean) ** 2 for r in right) / (len(right) - 1) / len(right)
        assert score.stderr["exact_match,answer"] == pytest.approx(spread**0.5)
        shares += right
    detach_adapter(model)
    assert 0.2 < sum(shares) / len(shares) < 1  # the test would show a difference

    average = group_score("all", {task: results["tuned"][task] for task in tasks})
    means = [results["tuned"][task].metrics["exact_match,answer"] for task in tasks]
    assert average.metrics["exact_match,answer"] == pytest.approx(sum(means) / 3)
    assert average.n == 11 and average.group and not results["tuned"][tasks[0]].group

    for arm, scores in results.items():
        write_task_samples(scores, tmp_path / f"{arm}.jsonl")
    bare, tuned = ([json.loads(x) for x in (tmp_path / f"{arm}.jsonl").open()] for arm in ("base", "tuned"))
    only = [[record for record in arm if record["task"] == "lorasuite_boolq"] for arm in (bare, tuned)]
    found = compare(*only, names=("base", "tuned"))
    assert found.metric == "exact_match,answer" and found.n == 4
    assert found.second_score == results["tuned"]["lorasuite_boolq"].metrics["exact_match,answer"]


def test_batches_and_limits(learnt: Any) -> None:
    base, tokenizer, adapter = learnt
    several = evaluate_tasks(
        base, tokenizer, ["lorasuite_addsub"], SETTINGS, adapters={"it": adapter}, eval_dir=SAMPLES
    )["it"]["lorasuite_addsub"]
    alone = evaluate_tasks(
        base, tokenizer, ["lorasuite_addsub"], EvaluationSettings(batch_size=1, limit=2), adapters={"it": adapter},
        eval_dir=SAMPLES,
    )["it"]["lorasuite_addsub"]  # fmt: skip
    assert [s.output for s in alone.samples] == [s.output for s in several.samples[:2]]
    assert (alone.n, alone.limit, alone.truncated) == (2, 2, 0)


def test_prompts_that_do_not_fit_are_counted(learnt: Any, tmp_path: Path) -> None:
    base, tokenizer, _ = learnt
    file = data_file("lorasuite_boolq", tmp_path)
    file.parent.mkdir()
    file.write_text(
        json.dumps([{"instruction": "true " * 300, "answer": "true"}, {"instruction": "x", "answer": "true"}])
    )
    score = evaluate_tasks(
        base, tokenizer, ["lorasuite_boolq"], SETTINGS, adapters={"base": None}, eval_dir=tmp_path
    )["base"]["lorasuite_boolq"]  # fmt: skip
    assert score.truncated == 1


def test_other_tasks_by_name(learnt: Any, tmp_path: Path, capfd: Any) -> None:
    base, tokenizer, adapter = learnt
    rows = [{"question": f"Question: say {word}\nAnswer:", "choices": ["one", "two"], "gold": 0} for word in "abc"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "local_choice.yaml").write_text(yaml.safe_dump(task))
    arguments = {"adapters": {"base": None, "tuned": adapter}, "include_path": tmp_path}
    results = evaluate_tasks(base, tokenizer, ["local_choice"], SETTINGS, **arguments)
    assert capfd.readouterr().out == ""
    for label in ("base", "tuned"):
        score = results[label]["local_choice"]
        assert score.n == 3
        assert set(score.metrics) == set(score.stderr) == {"acc,none"}
        assert score.num_fewshot == 0
        assert score.version == "1.0"
    likelihoods = results["tuned"]["local_choice"].samples[1].loglikelihoods
    assert likelihoods is not None and len(likelihoods) == 2 and likelihoods[0] < 0
    broken = LlamaForCausalLM(base.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="local_choice, document 1: its log-likelihood is not a number"):
        evaluate_tasks(broken, tokenizer, ["local_choice"], SETTINGS, adapters={"base": None}, include_path=tmp_path)
