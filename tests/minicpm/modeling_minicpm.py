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
        scale = config.scale_emb
        # Around the modules that adapters wrap, as the published code has it: an adapter's part is scaled, too.
        self.model.layers[0].register_forward_pre_hook(lambda _m, args: (args[0] * scale, *args[1:]))
        for layer in self.model.layers:
            layer.self_attn.register_forward_hook(lambda _m, _i, output: (output[0] * depth, *output[1:]))
            layer.mlp.register_forward_hook(lambda _m, _i, output: output * depth)
