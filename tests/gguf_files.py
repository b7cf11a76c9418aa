"""Files of llama.cpp, of the tiny Llama models of the tests: a base's, and a stand-in for the converter of LoRAs.

The converter itself is in no package. The stand-in takes its command line and does what it does with a Llama: names
modules as llama.cpp does, and puts the rows of ``q`` and ``k`` in the order of its rotary embedding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

#: ``SCALE``: what stands there multiplies every update.
CONVERTER = """
import argparse, json, pathlib
import gguf
from safetensors.numpy import load_file
parser = argparse.ArgumentParser()
parser.add_argument("--base", type=pathlib.Path, required=True)
parser.add_argument("--outfile", type=pathlib.Path, required=True)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"], default="f32")
parser.add_argument("lora_path", type=pathlib.Path)
given = parser.parse_args()
base = json.loads((given.base / "config.json").read_text())
config = json.loads((given.lora_path / "adapter_config.json").read_text())
heads = {"q_proj": base["num_attention_heads"], "k_proj": base["num_key_value_heads"]}
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base["num_hidden_layers"])
writer = gguf.GGUFWriter(given.outfile, "llama")
writer.add_string(gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER)
writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
for name, tensor in load_file(given.lora_path / "adapter_model.safetensors").items():
    module, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
    last = module.rsplit(".", 1)[1]
    if factor == "lora_B":
        tensor = tensor * SCALE
        if last in heads:
            rows = tensor.reshape(heads[last], 2, len(tensor) // heads[last] // 2, -1)
            tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
    writer.add_tensor(f"{names.get_name(module)}.weight.{factor.lower()}", tensor.astype("float32"))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


def write_converter(folder: Path, scale: float = 1.0) -> Path:
    """A checkout of llama.cpp, as far as there is one: its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "convert_lora_to_gguf.py").write_text(CONVERTER.replace("SCALE", str(scale)))
    return folder


def write_base(path: Path, model: Path) -> Path:
    """A Llama of :mod:`tests.models` as a GGUF file, in float32; its tokens are only numbered."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    vocabulary = config["vocab_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads["q_proj"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{n}" for n in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    kinds = [gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (vocabulary - len(kinds))])
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if last in heads:
            rows = tensor.reshape(heads[last], 2, len(tensor) // heads[last] // 2, -1)
            tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
