"""Task files of the user's run no code without leave: neither functions nor templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasuite.errors import ConfigError
from lorasuite.evaluation import check_tasks
from lorasuite.evaluation._task_code import task_file_problems, trusted_code_only

FUNCTION = "task: local\ndoc_to_text: !function utils.text\n"
BREAKOUT = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "plain.yaml").write_text("task: plain\na: &a [1]\nb: *a\ndoc_to_text: '!function is text'\n")
    (tmp_path / "tasks" / "broken.yaml").write_text("task: [")
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ntext = str\n")
    return tmp_path


@pytest.mark.parametrize(
    "files",
    [
        {"tasks/local.yaml": FUNCTION},
        {"tasks/deep/local.yaml": "task: [local, {a: [!function utils.text]}]\n"},
        {"tasks/local.yaml": "%TAG !e! !func\n---\ntask: local\ndoc_to_text: !e!tion utils.text\n"},
        {"tasks/local.yaml": "include: ../common.yaml\n", "common.yaml": FUNCTION},
        {"tasks/local.yaml": "include: [../a.yaml]\n", "a.yaml": "include: b.yaml\n", "b.yaml": FUNCTION},
    ],
)
def test_code_is_found_before_anything_runs(files: dict[str, str], folder: Path) -> None:
    assert task_file_problems([], folder / "tasks") == []
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (problem,) = task_file_problems([], folder / "tasks")
    assert "!function utils.text" in problem.what and "--trust-remote-code" in problem.remedy
    assert task_file_problems([str(folder / next(iter(files)))], None) == [problem]
    with pytest.raises(ConfigError, match="runs code of its own"):
        check_tasks(["local"], None, folder / "tasks")
    assert not (folder / "ran").exists()


def test_lm_eval_imports_and_renders_nothing_of_it(folder: Path) -> None:
    """What was overlooked before is refused when lm-eval comes to it."""
    from lm_eval import utils
    from lm_eval.tasks._yaml_loader import load_yaml

    file = folder / "local.yaml"
    file.write_text(FUNCTION)
    before = utils.env
    with trusted_code_only(False):
        with pytest.raises(ConfigError, match="runs code of its own"):
            load_yaml(file)
        with pytest.raises(Exception, match="unsafe"):
            utils.apply_template(BREAKOUT, {})
        assert utils.apply_template("{{ q.strip().split() | join('-') }}", {"q": " a b "}) == "a-b"
    assert not (folder / "ran").exists() and utils.env is before
    with trusted_code_only(False, [folder]):
        assert load_yaml(file)["doc_to_text"] is str
    with trusted_code_only(True):
        assert load_yaml(file)["doc_to_text"] is str and int(utils.apply_template(BREAKOUT, {})) > 1
