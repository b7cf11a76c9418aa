"""Tiny random models, a word-level tokenizer and rows for the fine-tuning and evaluation tests."""

from __future__ import annotations

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasuite.data import Row

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_WORDS = ["Question:", "Answer:", "Context:", "add", "twice", "say", "user", "assistant", "Ċ", *DIGITS]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ' ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)


def tiny_tokenizer(*, bos: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """Words split at spaces; ``bos`` makes it add one as Llama's does. It has no pad token, as many bases do not."""
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {word: index for index, word in enumerate([*specials, *_WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, hidden 32, GQA; random weights of a seed, in evaluation mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,  # larger than the tokenizer's, as padded embeddings are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tiny_lora(**changes: object) -> LoraConfig:
    """Rank 4 on every projection of attention and MLP."""
    settings: dict[str, object] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **changes})


def digit_rows(count: int = 8) -> list[Row]:
    """``add d`` → the next digit, of one or two words."""
    rows = []
    for index in range(count):
        answer = DIGITS[(index + 1) % 10]
        output = f"{answer} {answer}" if index % 3 == 0 else answer
        context = "twice" if index % 3 == 0 else ""
        rows.append(Row(kind="instruction", instruction=f"add {DIGITS[index % 10]}", input=context, output=output))
    return rows
