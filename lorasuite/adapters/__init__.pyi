from ._attachment import (
    attach_adapter,
    attached,
    attachment_problems,
    detach_adapter,
    restored,
    save_adapter,
    save_files,
    unwrap,
    without_old_names,
)
from ._base_modules import base_weight, vocabulary_side, vocabulary_weight, weight_shape
from ._combination import Combined, is_ready, open_adapters, write_ready
from ._files import CONFIG, PREFIX, WEIGHTS, Tensors
from ._fused import fuse_updates, split_update
from ._kinds import REFUSED, OutputType, config_problems
from ._lowrank import LowRank
from ._reader import Adapter
from ._sources import replace_sources, sources, sources_name, split_sources
from ._tokenizer import OwnTokenizer, own_tokenizer, tokenizer_digest, tokenizer_folder
from ._untrained import fresh_config, fresh_lora, untrained
from ._writer import Extras, check_loads, not_in_adalora, target_modules, write_adapter

__all__ = [
    "CONFIG",
    "PREFIX",
    "REFUSED",
    "WEIGHTS",
    "Adapter",
    "Combined",
    "Extras",
    "LowRank",
    "OutputType",
    "OwnTokenizer",
    "Tensors",
    "attach_adapter",
    "attached",
    "attachment_problems",
    "base_weight",
    "check_loads",
    "config_problems",
    "detach_adapter",
    "fresh_config",
    "fresh_lora",
    "fuse_updates",
    "is_ready",
    "not_in_adalora",
    "open_adapters",
    "own_tokenizer",
    "replace_sources",
    "restored",
    "save_adapter",
    "save_files",
    "sources",
    "sources_name",
    "split_sources",
    "split_update",
    "target_modules",
    "tokenizer_digest",
    "tokenizer_folder",
    "untrained",
    "unwrap",
    "vocabulary_side",
    "vocabulary_weight",
    "weight_shape",
    "without_old_names",
    "write_adapter",
    "write_ready",
]
