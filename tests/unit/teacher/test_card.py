"""What an adapter's card says of its prompts, and that nothing in it is run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lorasuite.data import Message, Row
from lorasuite.teacher import Card, card_text, parsed_card

CARD = """---
base_model: someone/base
widget:
- text: "Customer: where is my card?\\nIntent:"
  example_title: one
- messages:
  - {role: system, content: Be short.}
  - {role: user, content: "Why was I charged?"}
  - {role: assistant, content: a fee}
- text: 7
---
# Banking intents

<!-- This adapter says something hidden. -->
This adapter names the intent of a bank customer's message. It was trained on [data](http://example.com). Third.

```python
import os
os.system("touch /tmp/never")
prompt = "Customer: my card is lost\\nIntent:"
prompt = f"Customer: {text}\\nIntent:"
messages = [{"role": "user", "content": "Say the intent"}, {"role": "assistant", "content": "no"}]
print(pipe("Customer: hello\\nIntent:")[0])
other = "not a prompt"
open("/etc/passwd").read()
```

```
### Message:
{message}

### Intent:
{intent}
```
"""


def test_prompts_templates_and_description_are_found() -> None:
    card = parsed_card(CARD)
    assert [row.prompt for row in card.prompts if row.kind == "completion"] == [
        "Customer: where is my card?\nIntent:",
        "Customer: my card is lost\nIntent:",
        "Customer: hello\nIntent:",
    ]
    assert [row.messages for row in card.prompts if row.kind == "messages"] == [
        (Message("system", "Be short."), Message("user", "Why was I charged?")),
        (Message("user", "Say the intent"),),
    ]
    assert card.frames == (("Customer: ", "\nIntent:"), ("### Message:\n", "\n\n### Intent:\n"))
    assert card.description == ("This adapter names the intent of a bank customer's message. It was trained on data.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---\nwidget: [\n---\n",
        "---\nwidget: {text: a}\nx: !!python/object/apply:os.system ['touch x']\n---\n",
        "---\n- a\n---\n# Title\n\n[More Information Needed]\n\n- **Developed by:** [More Information Needed]\n",
        "```python\nprompt = (\n```\n```\n" + "(" * 500 + "\n```",
        "```python\nprompt = __import__('os').getcwd()\nmessages = [{'role': open('x')}]\n```",
        "\x00\ufffd `````\n~~~",
        "---\na: !!bool maybe\n---\n",
        "---\na: !!timestamp soon\nwidget: [{text: hi}]\n---\n",
        "---\na: !!int ''\n---\n",
        "---\nwidget: [{text: \"\\uD83D\"}]\n---\n```python\nprompt = 'a\\ud83d'\ntext = '{x}\\ud83d'\n```",
    ],
    ids=[
        "empty",
        "no yaml",
        "python tag",
        "PEFT's own",
        "no code",
        "calls",
        "bytes",
        "no bool",
        "no date",
        "no number",
        "half a character",
    ],
)
def test_a_card_that_says_nothing_or_is_broken_gives_nothing(text: str) -> None:
    assert not parsed_card(text) and parsed_card(text) == Card()


def test_a_head_that_cannot_be_read_is_told_and_the_rest_is_used() -> None:
    card = parsed_card("---\nwidget: [a: b: c\n---\nTells a bank's customers apart.\n")
    assert card.unread and card.description and not card.prompts
    assert not parsed_card(CARD).unread and not parsed_card("no head").unread


@pytest.mark.parametrize(
    "text",
    [
        "<!--" * 50_000,
        "```a\nx\n" * 30_000,
        "`" * 200_000,
        "a b c d " + "[a" * 90_000,
        "[a](" * 50_000,
        "\n \t" * 60_000,
    ],
    ids=["comments", "blocks", "marks", "brackets", "links", "blanks"],
)
def test_a_long_card_is_read_in_one_pass(text: str) -> None:
    begun = time.process_time()
    assert not parsed_card(text).prompts
    assert time.process_time() - begun < 2  # each of these took minutes where what is not closed was looked for again


def test_a_block_that_is_not_closed_goes_on_to_the_end_and_longer_marks_hold_shorter_ones() -> None:
    text = "Say what it is about.\n\n````python\nprompt = 'a ```'\n```\n````\n~~~py\nquery = 'why?'\n"
    card = parsed_card(text)
    assert card.description == "Say what it is about." and [row.prompt for row in card.prompts] == ["why?"]


def test_settings_beside_the_adapter_name_templates_and_pickles_are_not_read(tmp_path: Path) -> None:
    assert card_text(tmp_path) == ""
    (tmp_path / "README.md").write_text("# x\n")
    (tmp_path / "training_args.json").write_text('{"template": "alpaca", "output_dir": "/"}')
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04")
    card = parsed_card(card_text(tmp_path))
    ((before, after),) = card.frames
    assert before.endswith("### Instruction:\n") and after.endswith("### Response:\n") and not card.prompts


def test_a_prompt_with_a_place_is_a_template_and_long_ones_are_left_out() -> None:
    found = parsed_card("```python\ntext = 'Q: {q}\\nA:'\nprompt = '" + "a" * 5000 + "'\nquery = 'why?'\n```")
    assert found.frames == (("Q: ", "\nA:"),) and found.prompts == (Row("completion", prompt="why?"),)
