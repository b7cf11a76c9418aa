"""A stand-in for MiniCPM's own code, small: a Llama that scales its embeddings and what each block adds.

Test fixtures copy it beside their weights, as the published checkpoints have theirs: loading it needs
``trust_remote_code``.
"""

import math

from transformers import LlamaForCausalLM

from .configuration_minicpm import MiniCPMConfig


class MiniCPMForCausalLM(LlamaForCausalLM):
    config_class = MiniCPMConfig

    def __init__(self, config):
        super().__init__(config)
        depth = config.scale_depth / math.sqrt(config.num_hidden_layers)
        self.model.embed_tokens.register_forward_hook(lambda _m, _i, output: output * config.scale_emb)
        for layer in self.model.layers:
            for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
                block.register_forward_hook(lambda _m, _i, output: output * depth)
