"""Reading rows, rendering prompts and encoding them."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorasuite.data import (
    IGNORED,
    Message,
    Row,
    calibration_texts,
    encode,
    encode_pair,
    encode_rows,
    fingerprint_rows,
    prompt_ids,
    read_rows,
    read_template,
)
from lorasuite.errors import DataError

CORPUS = [
    "Question: How many apples are there?\nAnswer: 42",
    "Question: What is 5+5?\nAnswer: 10",
    "user: hello there assistant: hello to you",
] * 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe(*, bos: bool = False, eos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE as GPT-2's; optionally adding BOS or EOS on its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[2:],
    )
    tokenizer.chat_template = template
    return tokenizer


BPE = bpe()
BOS = BPE.bos_token_id
EOS = BPE.eos_token_id


def write(path, rows, *, lines=True):
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


RECORDS = [
    {"instruction": "What is 5+5?", "input": "", "output": "10", "answer": 10},
    {"instruction": "How many?", "input": "There are 42 apples.", "output": "42"},
    {"prompt": "hello", "completion": " there"},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}]},
    {"text": "apples are there"},
]


@pytest.mark.parametrize(("name", "lines"), [("a.jsonl", True), ("a.json", False), ("a.json", True), ("a.data", True)])
def test_every_shape_and_container(tmp_path, name, lines):
    rows = read_rows(write(tmp_path / name, RECORDS, lines=lines))
    assert [row.kind for row in rows] == ["instruction", "instruction", "completion", "messages", "text"]
    assert rows[0].extra == {"answer": 10}
    assert rows[3].messages == (Message("user", "hello"), Message("assistant", "hello to you"))
    assert hash(rows[0]) == hash(rows[0])


def test_containers_with_quirks(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf\n" + json.dumps({"text": "a\u2028b"}).encode() + b"\r\n\r\n")
    assert read_rows(tmp_path / "bom.jsonl") == [Row(kind="text", text="a\u2028b")]
    (tmp_path / "raw.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert read_rows(tmp_path / "raw.jsonl")[0].text == "a\u2028b"
    (tmp_path / "one.json").write_text('{\n "text": "a"\n}')
    assert read_rows(tmp_path / "one.json") == [Row(kind="text", text="a")]
    (tmp_path / "text.txt").write_text("one\ntwo\n\n \nthree\n")
    assert [row.text for row in read_rows(tmp_path / "text.txt")] == ["one\ntwo", "three"]
    # Alpaca's rows carry their rendered text as well; TRL's conversational rows have two lists of messages.
    alpaca = {"instruction": "a", "input": None, "output": "b", "text": "a b"}
    trl = {"prompt": RECORDS[3]["messages"][:1], "completion": RECORDS[3]["messages"][1:]}
    rows = read_rows(write(tmp_path / "more.jsonl", [alpaca, trl]))
    assert [row.kind for row in rows] == ["instruction", "messages"]
    assert rows[0].extra == {"text": "a b"}
    assert len(rows[1].messages) == 2


def test_all_bad_rows_are_reported_at_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    lines = [
        '{"text": "fine"}',
        "{not json",
        "[1]",
        '{"instruction": "q", "output": ""}',
        '{"instruction": "q", "output": 42}',
        '{"prompt": "  ", "completion": "a"}',
        '{"prompt": "q"}',
        '{"completion": "a"}',
        "",
        '{"text": " "}',
        '{"question": "q"}',
        '{"messages": []}',
        json.dumps({"messages": [assistant, user]}),
        json.dumps({"messages": [assistant]}),
        json.dumps({"messages": [user, {"role": "assistant", "content": " "}]}),
        json.dumps({"messages": [user, {"role": "assistant", "content": None}]}),
        json.dumps({"messages": "hello"}),
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_rows(path)
    found = {int(problem.where.rpartition(" ")[2]): problem for problem in caught.value.problems}
    assert sorted(found) == [2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17]
    assert all(problem.remedy for problem in found.values())
    assert "'output' is a number" in found[5].what
    assert "'question'" in found[11].what
    assert isinstance(caught.value, ValueError)


def test_many_bad_rows_are_cut_short_but_counted(tmp_path):
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / "bad.json", [{"text": ""}] * 50, lines=False))
    assert len(caught.value.problems) == 50
    assert "row 1:" in str(caught.value)
    assert "and 49 more of this kind: row 2, row 3, ..." in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "has no rows"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"line 2: is not UTF-8"),
        (b'[{"text": "a"},]', "is not valid JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


def test_prompts_are_as_in_the_method():
    assert Row(kind="instruction", instruction="Q?", output="A").prompt_and_completion() == (
        "Question: Q?\nAnswer:",
        " A",
    )
    assert Row(kind="instruction", instruction="Q?", input="C", output="A").prompt_and_completion() == (
        "Context: C\nQuestion: Q?\nAnswer:",
        " A",
    )
    # The space goes with the completion; a newline is meant and stays; nothing is added.
    assert Row(kind="completion", prompt="a:  ", completion="b").prompt_and_completion() == ("a:", "  b")
    assert Row(kind="completion", prompt="a:\n", completion="b").prompt_and_completion() == ("a:\n", "b")
    assert Row(kind="text", text="t").prompt_and_completion() == ("", "t")


def chat_row(answer: str = "hello to you") -> Row:
    return Row(kind="messages", messages=(Message("user", "hello"), Message("assistant", answer)))


def test_conversations_use_the_chat_template():
    tokenizer = bpe(template=CHATML)
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat_row().prompt_and_completion(tokenizer) == (prompt, "hello to you<|im_end|>\n")
    assert chat_row().target(tokenizer) == (prompt, "hello to you", "<|im_end|>\n")
    with pytest.raises(DataError, match="needs a tokenizer"):
        chat_row().prompt_and_completion()
    with pytest.raises(DataError, match="no chat template"):
        chat_row().prompt_and_completion(BPE)
    with pytest.raises(DataError, match="not the assistant's"):
        Row(kind="messages", messages=(Message("user", "q"),)).prompt_and_completion(tokenizer)
    refusing = bpe(template="{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match="no such role"):
        chat_row().prompt_and_completion(refusing)


def test_a_generation_prompt_that_finished_turns_lack():
    """Reasoning models open a block in the generation prompt; what is learnt is what follows that prompt."""
    thinking = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    prompt, completion = chat_row().prompt_and_completion(bpe(template=thinking))
    assert prompt.endswith("assistant\n<think>\n")
    assert completion == "hello to you<|im_end|>\n"


#: How families write a conversation, in few words each: what a template does around and to an answer.
TEMPLATES = {
    "chatml": CHATML,
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
        "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + '</s>' }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=60)
@given(
    answer=st.one_of(
        st.sampled_from(
            [*"abcdeimnst|<>_/[]:", "end", "assistant", "</s>", "hello", "hi d ", " x", "a\n", "<|im_end|>"]
        ),
        st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=4),
    )
)
def test_what_is_scored_is_the_answer(name, answer):
    """Every short answer under every template: never a piece of the prompt, or of the token that ends a turn."""
    tokenizer = bpe(template=TEMPLATES[name])
    ending = chat_row("hello to you").target(tokenizer)[2]
    prompt, scored, suffix = chat_row(answer).target(tokenizer)
    assert scored.strip() == answer.strip() and suffix == ending
    assert chat_row(answer).prompt_and_completion(tokenizer) == (prompt, scored + suffix)


def test_an_answer_that_the_template_rewrites():
    tokenizer = bpe(template=TEMPLATES["thinking"])
    assert chat_row("<think>why</think>so").target(tokenizer)[1:] == ("so", "<|im_end|>\n")
    upper = CHATML.replace("m['content']", "m['content'] | upper")
    assert chat_row("d").target(bpe(template=upper))[1].strip() == "D"


def test_calibration_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)
    texts = calibration_texts(path)
    assert texts[0] == "Question: What is 5+5?\nAnswer: 10"
    assert texts[2:] == ["hello there", "hello\nhello to you", "apples are there"]
    assert calibration_texts(path, bpe(template=CHATML))[3].startswith("<|im_start|>user")
    assert calibration_texts(path, BPE) == texts
    told = calibration_texts(path, template=read_template("alpaca"))
    assert told[0].endswith("### Response:\n10") and "What is 5+5?" in told[0] and told[2:] == texts[2:]


def test_fingerprint_is_of_the_content_only(tmp_path):
    one = read_rows(write(tmp_path / "a.jsonl", RECORDS))
    other = read_rows(write(tmp_path / "b.json", RECORDS, lines=False))
    assert fingerprint_rows(one) == fingerprint_rows(other)
    assert len(fingerprint_rows(one)) == 64
    assert fingerprint_rows(one) != fingerprint_rows(one[::-1])
    assert fingerprint_rows([Row(kind="text", text="a")]) != fingerprint_rows([Row(kind="text", text="b")])
    # Moving a text between fields must show.
    assert fingerprint_rows([Row(kind="completion", prompt="ab", completion="c")]) != fingerprint_rows(
        [Row(kind="completion", prompt="a", completion="bc")]
    )


# --------------------------------------------------------------------------------------------- encoding


def test_instruction_rows_learn_prompt_and_answer():
    (example,) = encode([Row(kind="instruction", instruction="What is 5+5?", output="10")], BPE)
    text = "Question: What is 5+5?\nAnswer: 10"
    assert example["input_ids"] == [*BPE(text)["input_ids"], EOS]
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]
    assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_other_rows_learn_the_completion_or_all():
    completion, text = encode(
        [Row(kind="completion", prompt="hello", completion=" there"), Row(kind="text", text="hello there")],
        bpe(bos=True),
    )
    start, head, tail = BOS, BPE("hello")["input_ids"], BPE(" there")["input_ids"]
    assert completion["input_ids"] == text["input_ids"] == [start, *head, *tail, EOS]
    assert completion["labels"] == [IGNORED] * (1 + len(head)) + [*tail, EOS]
    assert text["labels"] == [IGNORED, *head, *tail, EOS]


def test_conversations_learn_the_last_turn_and_its_end():
    tokenizer = bpe(bos=True, template="{{ bos_token }}" + CHATML)
    (example,) = encode([chat_row()], tokenizer)
    ids, labels = example["input_ids"], example["labels"]
    assert ids.count(tokenizer.bos_token_id) == 1  # the template's, not the tokenizer's as well
    learnt = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(learnt) == "hello to you<|im_end|>\n"  # no EOS after the template's own end
    assert tokenizer.decode(ids[: len(ids) - len(learnt)]).endswith("<|im_start|>assistant\n")
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (example,) = encode([chat_row()], bpe(template=bare))
    assert example["labels"][-1] == EOS  # this template ends nothing


def test_cutoff_drops_and_counts_rows_without_completion(caplog):
    short = Row(kind="completion", prompt="hello", completion=" there")
    long = Row(kind="completion", prompt="hello there " * 20, completion="you")
    with caplog.at_level(logging.WARNING, logger="lorasuite.data._encoding"):
        encoded = encode_rows([long, short, long], BPE, cutoff=16)
    assert encoded.cut_off == [0, 2]
    assert len(encoded.examples) == 1
    assert "2 of 3 rows" in caplog.text
    with pytest.raises(DataError, match="no row of 2"):
        encode([long, long], BPE, cutoff=16)
    with pytest.raises(DataError, match="there are none"):
        encode([], BPE)
    with pytest.raises(DataError, match="at least 2"):
        encode([short], BPE, cutoff=1)
    (example,) = encode([Row(kind="text", text="hello there " * 40)], BPE, cutoff=16)
    assert len(example["input_ids"]) == 16
    assert example["input_ids"][-1] != EOS  # the text goes on


def test_a_tokenizer_that_appends_eos_does_not_end_prompts():
    tokenizer = bpe(bos=True, eos=True)
    assert tokenizer("hello")["input_ids"][-1] == EOS
    assert prompt_ids(tokenizer, "hello") == [BOS, *BPE("hello")["input_ids"]]
    assert prompt_ids(tokenizer, "hello</s>")[-1] == EOS  # written out, it is meant
    (example,) = encode([Row(kind="completion", prompt="hello", completion=" there")], tokenizer)
    assert example["input_ids"].count(EOS) == 1


def test_bos_is_not_doubled():
    tokenizer = bpe(bos=True)
    assert prompt_ids(tokenizer, "<s>hello") == prompt_ids(tokenizer, "hello")
    assert prompt_ids(tokenizer, "hello", special=False) == BPE("hello")["input_ids"]


def test_a_token_across_the_boundary_keeps_the_prompt_as_generated():
    """ "app|les" is one token in running text; at generation the model is given the prompt's own tokens."""
    whole = BPE(" apples")["input_ids"]
    assert len(whole) == 1
    head, tail = encode_pair(BPE, " app", "les")
    assert head == BPE(" app")["input_ids"]
    assert tail == BPE("les")["input_ids"]
    assert head + tail != whole


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20),
    completion=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20),
)
def test_prompt_tokens_are_those_of_generation_and_nothing_is_lost(prompt, completion):
    head, tail = encode_pair(BPE, prompt, completion)
    assert head == BPE(prompt)["input_ids"]
    assert BPE.decode(head + tail, clean_up_tokenization_spaces=False) == prompt + completion
