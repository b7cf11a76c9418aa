"""The config of a stand-in for MiniCPM's own code: the same names, and the same three scales."""

from transformers import LlamaConfig


class MiniCPMConfig(LlamaConfig):
    model_type = "minicpm"

    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: int = 1
    tie_word_embeddings: bool = True
