"""What an adapter's card says of its prompts, and that nothing in it is run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model

from lorasuite import zoo
from lorasuite.data import Message, Row, read_prompts, rows_to_jsonl
from lorasuite.reporting import model_card
from lorasuite.teacher import Card, card_texts, parsed_card
from tests.models import load
from tests.records import record

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
    assert card_texts(tmp_path) == ("", "")
    (tmp_path / "README.md").write_text("# x\n")
    (tmp_path / "training_args.json").write_text('{"template": "alpaca", "output_dir": "/"}')
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04")
    card = parsed_card(*card_texts(tmp_path))
    ((before, after),) = card.frames
    assert before.endswith("### Instruction:\n") and after.endswith("### Response:\n") and not card.prompts


def test_of_training_settings_nothing_but_templates_is_read(tmp_path: Path) -> None:
    (tmp_path / "training_args.json").write_text(
        '{"learning_rate": 0.0002, "output_dir": "out", "seed": 3, "epochs": 1}'
    )
    (tmp_path / "axolotl_config.yaml").write_text(
        "base_model: a/b\nload_in_8bit: false\nadapter: lora\nprompt: '{x} ='\n"
    )
    assert parsed_card(*card_texts(tmp_path)) == Card()
    (tmp_path / "README.md").write_text("Names intents of messages.\n\n```\nCustomer: {text}\nIntent:")  # not closed
    card = parsed_card(*card_texts(tmp_path))
    assert card.description == "Names intents of messages." and card.frames == (("Customer: ", "\nIntent:"),)


def test_a_prompt_with_a_place_is_a_template_and_long_ones_are_left_out() -> None:
    found = parsed_card("```python\ntext = 'Q: {q}\\nA:'\nprompt = '" + "a" * 5000 + "'\nquery = 'why?'\n```")
    assert found.frames == (("Q: ", "\nA:"),) and found.prompts == (Row("completion", prompt="why?"),)


#: Alpaca as cards of Unsloth's notebooks show it.
ALPACA = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
ASKED = ("Customer: ", "\nIntent:")


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("```\nimport x\nprompt = f'Customer: {text}\\nIntent:'\nprint(x(prompt))\n```", [ASKED]),
        ("```\nCustomer: {text}\nIntent: {intent}\n```", [("Customer: ", "\nIntent:")]),
        (
            "```\n<|user|>\n{system_message}<|end|>\n<|user|>\n{prompt}<|end|>\n<|assistant|>\n```",
            [("<|user|>\n<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>")],
        ),
        (
            f'```python\nalpaca_prompt = """{ALPACA}"""\n```',
            [
                ("Below is an instruction.\n\n### Instruction:\n", "\n\n### Input:\n\n\n### Response:\n"),
                ("Below is an instruction.\n\n### Instruction:\n\n\n### Input:\n", "\n\n### Response:\n"),
            ],
        ),
        (
            "```\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n```",
            [
                ("### Instruction:\n", "\n\n### Input:\n\n\n### Response:"),
                ("### Instruction:\n\n\n### Input:\n", "\n\n### Response:"),
            ],
        ),
        ("```\nQ: {question}\nA: {answer}</s>\n```", [("Q: ", "\nA:")]),
        ("```python\nprompt_template = 'Customer: {text}\\nIntent:'\n```", [ASKED]),
        ("```python\nprompt = 'Customer: {}\\nIntent:'.format(text)\n```", [ASKED]),
        ("```python\nprompt = 'Customer: ' + text + '\\nIntent:'\n```", [ASKED]),
        ("```python\n!pip install x\n%cd x\nprompt = f'Customer: {x}\\nIntent:'\n```", [ASKED]),
        ("```pycon\n>>> prompt = f'Customer: {x}\\nIntent:'\n>>> pipe(prompt)\n'a fee'\n```", [ASKED]),
        ("1. Use it:\n\n   ```python\n   prompt = f'Customer: {x}\\nIntent:'\n   ```\n\n2. Then\n", [ASKED]),
    ],
    ids=[
        "untagged code", "two places", "system", "Unsloth", "two inputs", "answer ends", "name", "format", "sum",
        "notebook", "session", "indented",
    ],
)  # fmt: skip
def test_a_template_is_what_stands_around_its_input(text: str, frames: list[tuple[str, str]]) -> None:
    card = parsed_card(text)
    assert list(card.frames) == frames and not card.prompts and not card.left_out


def test_prompts_are_read_of_what_is_put_together_and_of_untagged_conversations() -> None:
    assert (
        parsed_card("```python\nprompt = 'Customer: a' + '\\nIntent:'\n```").prompts[0].prompt == "Customer: a\nIntent:"
    )
    said = parsed_card('```\n[{"role": "user", "content": "Say the intent"}]\n```').prompts
    assert [row.messages for row in said] == [(Message("user", "Say the intent"),)]


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprompt = (\n```",
        "```\nimport x\nprompt = f'Customer: {text}\n```",
        "```\n{}\n```",
        "```\n{% for message in messages %}{{ message.content }}{% endfor %}\n```",
        "```python\nprompt = 'Customer: %s' % text\n```",
        f"```\n{'{text} ' * 9}\n```",
        f"```\n{'a' * 5000} {{text}}\n```",
    ],
    ids=["no code", "broken code", "place alone", "jinja", "percent", "places", "long"],
)
def test_what_cannot_be_read_is_counted(text: str) -> None:
    card = parsed_card(text)
    assert not card and card.left_out == 1


@pytest.mark.parametrize(
    "code",
    ["system_prompt = 'You are kind.'", "chat_template = 'alpaca'", "inputs = tokenizer(prompt)", "print('{x}: y')"],
)
def test_other_strings_of_a_snippet_are_neither_read_nor_counted(code: str) -> None:
    card = parsed_card(f"```python\n{code}\n```")
    assert not card and not card.left_out


#: As Trainer writes it, of transformers 5.
TRAINER = """---
library_name: peft
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# out

This model is a fine-tuned version of [org/base](https://huggingface.co/org/base) on the None dataset.
It achieves the following results on the evaluation set:
- Loss: 0.5

## Model description

More information needed

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.0002

### Training results

| Training Loss | Epoch | Step | Validation Loss |
|:-------------:|:-----:|:----:|:---------------:|
| 0.6           | 1.0   | 10   | 0.5             |
"""

#: As TRL's trainers write it.
TRL = """---
base_model: org/base
model_name: sft
---

# Model Card for sft

This model is a fine-tuned version of [org/base](https://huggingface.co/org/base){on}.
It has been trained using [TRL](https://github.com/huggingface/trl).

## Quick start

```python
from transformers import pipeline

question = "If you had a time machine, but could only go to the past or the future and never return, which would you choose and why?"
generator = pipeline("text-generation", model="me/sft", device="cuda")
output = generator([{"role": "user", "content": question}], max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
```

## Training procedure

[<img src="https://raw.githubusercontent.com/wandb/badge.svg" alt="Visualize in Weights & Biases"/>](https://wandb.ai/x)

This model was trained with {trainer}.

### Framework versions

- TRL: 0.12.0

## Citations

Cite TRL as:

```bibtex
@misc{vonwerra2022trl, title = {{TRL: Transformer Reinforcement Learning}}}
```
"""  # noqa: E501 - the line is TRL's

PAPER = "DPO, a method introduced in [Direct Preference Optimization](https://huggingface.co/papers/2305.18290)"


@pytest.mark.parametrize(
    "text",
    [
        str(ModelCard.from_template(ModelCardData(base_model="org/base", library_name="peft"))),
        TRAINER,
        TRAINER.replace(
            "is a fine-tuned version of [org/base](https://huggingface.co/org/base) on the None",
            "was trained from scratch on an unknown",
        ),
        TRL.replace("{on}", "").replace("{trainer}", "SFT"),
        TRL.replace("{on}", " on the [a/b](https://huggingface.co/datasets/a/b) dataset").replace("{trainer}", PAPER),
        "# Uploaded model\n\nThis llama model was trained 2x faster with [Unsloth](http://x) and the TRL library.\n",
    ],
    ids=["the Hub's template", "Trainer", "Trainer without a base", "TRL", "TRL with a paper", "Unsloth"],
)
def test_a_card_that_a_tool_wrote_says_nothing_of_the_task(text: str) -> None:
    assert parsed_card(text) == Card()
    told = parsed_card(f"{text}\n\nIt names the intent of a bank customer's message.\n")
    assert told.description == "It names the intent of a bank customer's message."


def test_the_card_of_a_migrated_adapter_says_nothing_of_the_task() -> None:
    assert parsed_card(model_card(record())) == Card()


def test_the_card_that_peft_saves_says_nothing_of_the_task(tmp_path: Path) -> None:
    get_peft_model(load(zoo.pair("neox").old), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    (card, _), beside = card_texts(tmp_path), tmp_path / "README.md"
    assert "made aware of the risks" in card and not parsed_card(card)
    filled = card.replace("### Direct Use", "### Direct Use\n\nUse it to name the intent of a bank's messages.")
    beside.write_text(filled)
    assert parsed_card(*card_texts(tmp_path)).description == "Use it to name the intent of a bank's messages."


def test_what_follows_boilerplate_is_the_description() -> None:
    tuned = "This model is a fine-tuned version of [a/b](http://x) for naming what bank customers want."
    assert parsed_card(tuned).description == tuned.replace("[a/b](http://x)", "a/b")
    mixed = "This model is a fine-tuned version of a/b. It names intents of messages. Use it as follows:\n- so\n"
    assert parsed_card(mixed).description == "It names intents of messages."


def test_the_name_of_a_pipeline_is_no_prompt_and_what_it_is_asked_is_one() -> None:
    text = "```python\npipe = pipeline('text-generation', model='x')\nprint(pipe('Customer: hello\\nIntent:'))\n```"
    assert parsed_card(text).prompts == (Row("completion", prompt="Customer: hello\nIntent:"),)


def test_blank_examples_are_left_out_and_the_rest_can_be_stored(tmp_path: Path) -> None:
    blank = "- text: '   '\n- messages: [{role: user, content: ' '}]\n"
    assert not parsed_card(f"---\nwidget:\n{blank}---\n")
    card = parsed_card(f"---\nwidget:\n{blank}- text: hello\n---\n")
    (tmp_path / "rows.jsonl").write_bytes(rows_to_jsonl(list(card.prompts)))
    assert read_prompts(tmp_path / "rows.jsonl") == [Row("completion", prompt="hello")]
