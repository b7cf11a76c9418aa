"""What conversations have beside roles and text reaches the chat template, or is named."""

from __future__ import annotations

import pytest

from lorasuite.data import fingerprint_rows, read_rows, rows_to_jsonl, unanswered, unread_keys
from lorasuite.errors import DataError
from tests.unit.data.test_data import bpe, write

TOOLS = (
    "{% if tools %}{{ 'TOOLS ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] or [] %}{{ p['text'] }}"
    "{% endfor %}{% endif %}{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['name'] + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_is_given_everything_a_conversation_has(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}], "reasoning_content": "look"}
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "Oslo?"}]
    record = {
        "messages": [{"role": "user", "content": parts}, call, {"role": "tool", "content": "4 C"},
                     {"role": "assistant", "content": "4"}],
        "tools": [{"name": "weather"}],
    }  # fmt: skip
    asked = {"messages": record["messages"][:2], "tools": record["tools"]}
    answered, calls = read_rows(write(tmp_path / "a.jsonl", [record, asked]))
    prompt, scored, suffix = answered.target(bpe(template=TOOLS))
    assert prompt.startswith('TOOLS [{"name": "weather"}]') and "in Oslo?<|im_end|>" in prompt
    assert "<think>look</think><call>weather</call><|im_end|>" in prompt and (scored, suffix) == ("4", "<|im_end|>\n")
    assert calls.target(bpe(template=TOOLS))[1:] == ("<think>look</think><call>weather</call>", "<|im_end|>\n")
    again = tmp_path / "b.jsonl"
    again.write_bytes(rows_to_jsonl([answered, calls]))
    assert read_rows(again) == [answered, calls] and fingerprint_rows(read_rows(again)) == fingerprint_rows(
        [answered, calls]
    )
    without = {"messages": [record["messages"][0], {"role": "assistant", "content": "4"}]}
    (plain,) = read_rows(write(tmp_path / "c.jsonl", [without]))
    assert fingerprint_rows([plain]) != fingerprint_rows([calls])
    assert unanswered(calls).extra == {"tools": record["tools"]}
    image = {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "4"}]}
    with pytest.raises(DataError, match="message 1 has no text"):
        read_rows(write(tmp_path / "d.jsonl", [image]))


def test_keys_that_nothing_reads_are_named(tmp_path):
    row = {"instruction": "q", "input": "", "output": "a"}
    for key, value in (("system", "You translate."), ("history", [["a", "b"]])):
        with pytest.raises(DataError, match=f"has '{key}', for which"):
            read_rows(write(tmp_path / f"{key}.jsonl", [{**row, key: value}]))
    rows = read_rows(write(tmp_path / "a.jsonl", [{**row, "id": 1, "system": ""}, {**row, "id": 2}]))
    assert unread_keys(rows) == {"id": 2, "system": 1}
