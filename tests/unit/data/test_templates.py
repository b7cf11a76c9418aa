"""Templates of instruction rows: the known ones, Jinja files, and what is said of those that cannot be used."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from lorasuite.data import (
    DEFAULT_TEMPLATE,
    Row,
    Template,
    encode,
    fingerprint_rows,
    known_templates,
    read_prompts,
    read_rows,
    read_template,
    rows_to_jsonl,
    templated,
    unread_keys,
)
from lorasuite.errors import ConfigError, DataError
from tests.integration.tiny import tiny_tokenizer

ADD = Row("instruction", instruction=" Add. ", input="1 2", output=" 3 ")
BARE = Row("instruction", instruction="Add.", output="3")
EVIL = {
    "{{ output.__class__ }}": "unsafe",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ ''.__class__.__mro__ }}{{ instruction }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
    "{% include '/etc/passwd' %}": "",
    "{% for a in range(100000000) %}{{ a }}{% endfor %}": "",
    "{% for a in range(99999) %}{{ instruction * 9999 }}{% endfor %}": "more than 10000000 characters",
    "{{ 1 / 0 }}": "ZeroDivisionError",
}


@pytest.mark.parametrize("name", known_templates())
def test_known_templates_write_everything_once_and_where_it_belongs(name: str) -> None:
    template = read_template(name)
    template.check()
    for row in (ADD, BARE):
        made = template.apply(row)
        prompt, answer, end = made.target()
        assert made.kind == "completion" and answer.strip() == "3" and not prompt.endswith(" ")
        assert prompt.count("Add.") == 1 and prompt.count("1 2") == (1 if row.input else 0)
        assert "{" not in prompt and (end.startswith("<") or not end)
        # the same prompt where the answer is not known, as the teacher is given it
        asked = template.apply(Row("instruction", instruction=row.instruction, input=row.input))
        assert asked.target()[0] == prompt and not asked.completion


def test_the_default_is_what_rows_render_themselves() -> None:
    for row in (ADD, BARE):
        assert read_template(DEFAULT_TEMPLATE).apply(row).target() == row.target()
    assert templated([ADD], read_template(DEFAULT_TEMPLATE)) == [ADD]


def test_other_rows_are_left_as_they_are() -> None:
    rows = [Row("text", text="x"), Row("completion", prompt="a", completion=" b"), ADD]
    assert templated(rows, read_template("plain"))[:2] == rows[:2]


def test_a_file_over_the_rows_own_keys(tmp_path: Path) -> None:
    file = tmp_path / "house.jinja"
    file.write_text(
        "<<{{ topic }}>> {{ instruction }}{% if input %} ({{ input }}){% endif %} -> {{ output }} <<end>>\n"
    )
    (tmp_path / "rows.jsonl").write_text(
        '{"instruction": "Add.", "output": "3", "topic": "sums", "id": 7}\n'
        '{"instruction": "Add.", "input": "1 2", "output": "3", "topic": "sums", "id": 8}\n'
    )
    template = read_template(str(file))
    rows = templated(read_rows(tmp_path / "rows.jsonl"), template)
    assert [row.target() for row in rows] == [
        ("<<sums>> Add. ->", " 3", " <<end>>"),
        ("<<sums>> Add. (1 2) ->", " 3", " <<end>>"),
    ]
    assert unread_keys(rows) == {"id": 2}  # what the template read is read
    assert [row.prompt for row in read_prompts(tmp_path / "rows.jsonl", template=template)] == [
        row.prompt for row in rows
    ]
    assert template.label == "house.jinja"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ instruction }", "line 1.*no Jinja template"),
        ("a\n{% if input %}{{ instruction }} {{ output }}", "line 2.*no Jinja template"),
        ("{{ instruction }}", "never writes the row's output"),
        ("fixed {{ output }}", "never writes the row's instruction"),
    ],
)
def test_files_that_are_no_template(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_template(str(tmp_path / "t.jinja"))


def test_neither_a_name_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'alpaca'"):
        read_template("alpacca")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_template(str(tmp_path / "binary"))


def test_a_template_that_does_not_end_is_refused_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasuite.bases._template_limits.SECONDS", 0.5)
    words = "{{ instruction }}{{ input }}{{ output }}"
    (tmp_path / "t.jinja").write_text(words + "{{ 'a' * 10 ** 10 }}")
    with pytest.raises(ConfigError, match=r"t.jinja: takes more than 1 GiB of memory for an instruction of one word"):
        read_template(str(tmp_path / "t.jinja"))
    # one that ends for most rows, and not for this one
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    (tmp_path / "t.jinja").write_text(words + f"{{% if input not in ['', 'b'] %}}{loops}{{% endif %}}")
    template = read_template(str(tmp_path / "t.jinja"))
    assert templated([Row("instruction", instruction="Add.", output="3")], template)
    for at_once in (10_000, 1):
        monkeypatch.setattr("lorasuite.bases._template_limits.AT_ONCE", at_once)
        with pytest.raises(DataError, match=r"t.jinja, row 2: takes more than 0.5 seconds, or more than 1 GiB"):
            templated([Row("instruction", instruction="Add.", output="3"), ADD], template)


def test_rows_are_rendered_once_and_nothing_of_them_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasuite.bases._template_limits.AT_ONCE", 30)
    template = Template("t", "Do: {{ instruction }} {{ input }}\n{{ output }} {{ id.missing }}")
    rows = [
        replace(row, instruction=f"{number} {'word ' * 500}", extra={"id": {} if number == 70 else {"missing": 1}})
        for number in range(100)
        for row in (ADD, BARE)
    ]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("rendered twice")

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with monkeypatch.context() as once:
            once.setattr(Template, "_rendered", never)
            with pytest.raises(DataError, match=r"row 141: .*UndefinedError") as error:
                templated(rows, template)
        assert [problem.where for problem in error.value.problems] == ["template t, row 141", "template t, row 142"]
        with monkeypatch.context() as again:  # within limits before: in this process, and with the same result
            again.setattr("subprocess.run", never)
            with pytest.raises(DataError) as same:
                templated(rows, template)
        assert same.value.problems == error.value.problems
        del error, same
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 100_000  # of 500 kB
    finally:
        tracemalloc.stop()
    assert templated(rows[:2], template) == [template.apply(row) for row in rows[:2]]


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_leaves_the_sandbox(evil: str) -> None:
    with pytest.raises(DataError, match="cannot be rendered") as error:
        Template("t", evil + "{{ instruction }}{{ input }}{{ output }}").apply(ADD)
    assert EVIL[evil] in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{{ instruction }} {{ system }} {{ input }} {{ output }}",
            "'system' is undefined.*instruction, input, output",
        ),
        ("{{ instruction }} {{ output }}", "no place for the row's input"),
        ("{{ instruction }} {{ input }} {{ output }} {{ output }}", "writes the output 2 times"),
        ("{% if not input %}{{ output }}{% endif %}{{ instruction }}", "writes the output 0 times"),
        ("{{ output }} {{ instruction }}{{ input }}", "writes nothing before the output"),
    ],
)
def test_rows_that_a_template_cannot_render_are_named(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        templated([ADD, ADD], Template("t", text))
    assert len(error.value.problems) == 2 and "template t, row 2" in error.value.problems[1].where


def test_the_end_of_an_answer_is_kept_and_trained_on(tmp_path: Path) -> None:
    row = Row("completion", prompt="say one", completion=" two", end_of_answer=" </s>")
    (tmp_path / "rows.jsonl").write_bytes(rows_to_jsonl([row]))
    assert read_rows(tmp_path / "rows.jsonl") == [row]
    plain = Row("completion", prompt="say one", completion=" two")
    assert fingerprint_rows([row]) != fingerprint_rows([plain])
    tokenizer = tiny_tokenizer()
    # the end that the template writes is learnt, and no second one is put behind it
    assert encode([row], tokenizer) == encode([plain], tokenizer)
    ended = Row("completion", prompt="say one", completion=" two", end_of_answer=" nine")
    assert encode([ended], tokenizer)[0]["labels"][-2:] == tokenizer("two nine", add_special_tokens=False)["input_ids"]
