"""Rows of the fifteen tasks: from a directory laid out as LLM-Adapters' ``dataset/``, or from Hub data sets.

A row is ``{"instruction", "input", "answer"}``, the instruction worded as LLM-Adapters words it. Its ``output``, where
there is one, is another model's chain of thought and may well be wrong: it is not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasuite.data import Row
from lorasuite.errors import DataError, Problem
from lorasuite.evaluation._answers import AnswerKind

DATA_FILE = "test.json"
LETTERS = "ABCDE"


def load(
    *,
    folder: str,
    kind: AnswerKind,
    hub: str,
    split: str,
    choices: Sequence[str] = (),
    config: str | None = None,
    revision: str | None = None,
    eval_dir: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """A task's documents as lm-eval takes them: ``{"test": Dataset}``.

    Columns: ``prompt`` (rendered as in training), ``answer``, ``kind``, ``choices``. Called by lm-eval with a task's
    ``dataset_kwargs`` and the task manager's metadata, ``eval_dir`` among them.

    Raises:
        DataError: rows that are missing or malformed, each one named.
    """
    from datasets import Dataset, load_dataset

    if eval_dir is not None:
        file = Path(eval_dir) / folder / DATA_FILE
        where, rows = str(file), read(file)
    else:
        where = f"{hub} ({split})"
        rows = [CONVERT[folder](row) for row in load_dataset(hub, config, split=split, revision=revision)]
    check(where, rows, kind, choices)
    documents = [
        {
            "prompt": Row(
                kind="instruction", instruction=row["instruction"], input=row.get("input") or ""
            ).prompt_and_completion()[0],
            "answer": str(row["answer"]).strip(),
            "kind": kind,
            "choices": list(choices),
        }
        for row in rows
    ]
    return {"test": Dataset.from_list(documents)}


def check_file(file: Path) -> None:
    """Find out whether a task's rows are where they should be.

    Raises:
        DataError: if they are not.
    """
    if not file.is_file():
        folders = file.parent.parent
        there = sorted(found.parent.name for found in folders.glob(f"*/{DATA_FILE}"))
        remedy = f"{folders} has {', '.join(there)}." if there else "Give a directory of <task>/test.json files."
        raise DataError(Problem(str(file), "does not exist", remedy))


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a ``test.json``.

    Raises:
        DataError: if it is missing, or no JSON array of objects.
    """
    check_file(file)
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(Problem(str(file), f"is not JSON ({error})", "Correct the file.")) from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(Problem(str(file), "is not an array of rows", "Use LLM-Adapters' format."))
    return rows


def check(where: str, rows: Sequence[Mapping[str, Any]], kind: AnswerKind, choices: Sequence[str]) -> None:
    """Check a task's rows.

    Args:
        where: they come from, for the message.
        rows: the rows.
        kind: of the task's answers.
        choices: the answers of a task whose kind is ``choice``.

    Raises:
        DataError: with every row that has no instruction, or an answer that is none of the task's.
    """
    problems = []
    for number, row in enumerate(rows, start=1):
        name = f"{where}, row {number}"
        if not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
            problems.append(Problem(name, "has no instruction", "Fill it in, or drop the row."))
        answer = str(row.get("answer", "")).strip()
        if not _valid(answer, kind, choices):
            wanted = {"number": "a number", "letter": "one of A to E", "choice": f"one of {', '.join(choices)}"}[kind]
            problems.append(Problem(name, f"its answer {answer!r} is not {wanted}", "Correct it, or drop the row."))
    if problems:
        raise DataError(problems)


def _valid(answer: str, kind: AnswerKind, choices: Sequence[str]) -> bool:
    if kind == "number":
        try:
            return abs(float(answer)) < float("inf")
        except ValueError:
            return False
    return len(answer) == 1 and answer in LETTERS if kind == "letter" else answer in choices


def _row(instruction: str, answer: object) -> dict[str, str]:
    return {"instruction": instruction, "answer": str(answer).replace(",", "").strip()}


def _gsm8k(row: Mapping[str, Any]) -> dict[str, str]:
    return _row(row["question"], row["answer"].rpartition("####")[2])


def _aqua(row: Mapping[str, Any]) -> dict[str, str]:
    options = " ".join(f"({option[0]}) {option[2:]}" for option in row["options"])  # "A)21%"
    return _row(f"{row['question']} Answer Choices: {options}", row["correct"])


def _svamp(row: Mapping[str, Any]) -> dict[str, str]:
    body = row["Body"].strip()
    return _row(f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}", row["Answer"])


def _boolq(row: Mapping[str, Any]) -> dict[str, str]:
    head = "Please answer the following question with true or false, question"
    return _row(f"{head}: {row['question']}?\n\nAnswer format: true/false", str(bool(row["answer"])).lower())


def _piqa(row: Mapping[str, Any]) -> dict[str, str]:
    solutions = f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\nAnswer format: solution1/solution2"
    head = "Please choose the correct solution to the question"
    return _row(f"{head}: {row['goal']}\n\n{solutions}", f"solution{int(row['label']) + 1}")


def _chosen(head: str, stem: str, options: Sequence[str], right: int, tail: str = "\n\n") -> dict[str, str]:
    """``Answer1: … Answer2: …``; ``right`` counts from 1."""
    named = " ".join(f"{stem.capitalize()}{n}: {option}" for n, option in enumerate(options, start=1))
    names = "/".join(f"{stem}{n}" for n in range(1, len(options) + 1))
    return _row(f"{head}\n\n{named}{tail}Answer format: {names}", f"{stem}{right}")


def _siqa(row: Mapping[str, Any]) -> dict[str, str]:
    head = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _chosen(head, "answer", [row["answerA"], row["answerB"], row["answerC"]], int(row["label"]))


def _hellaswag(row: Mapping[str, Any]) -> dict[str, str]:
    head = "Please choose the correct ending to complete the given sentence"
    sentence = f"{row['activity_label']}: {row['ctx']}"
    return _chosen(f"{head}: {sentence}", "ending", row["endings"], int(row["label"]) + 1)


def _winogrande(row: Mapping[str, Any]) -> dict[str, str]:
    head = "Please choose the correct answer to fill in the blank to complete the given sentence"
    return _chosen(f"{head}: {row['sentence']}", "option", [row["option1"], row["option2"]], int(row["answer"]), " ")


def _science(row: Mapping[str, Any]) -> dict[str, str]:
    """ARC and OpenBookQA."""
    question = row["question"] if "question" in row else row["question_stem"]
    right = row["choices"]["label"].index(row["answerKey"].strip()) + 1
    head = f"Please choose the correct answer to the question: {question}"
    return _chosen(head, "answer", row["choices"]["text"], right)


#: Rows of the Hub data sets as LLM-Adapters words them, by folder.
CONVERT: dict[str, Callable[[Mapping[str, Any]], dict[str, str]]] = {
    "AddSub": lambda row: _row(row["input"], row["output_answer"]),
    "SingleEq": lambda row: _row(row["input"], row["output_answer"]),
    "MultiArith": lambda row: _row(row["question"], row["final_ans"]),
    "mawps": lambda row: _row(row["question"], row["result_float"]),
    "gsm8k": _gsm8k,
    "AQuA": _aqua,
    "SVAMP": _svamp,
    "boolq": _boolq,
    "piqa": _piqa,
    "social_i_qa": _siqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "ARC-Easy": _science,
    "ARC-Challenge": _science,
    "openbookqa": _science,
}
