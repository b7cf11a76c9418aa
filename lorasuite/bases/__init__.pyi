from ._architecture import Architecture, in_order
from ._architecture_files import BUILT_IN, add_architectures, architecture_for, architectures, load
from ._cache import ModelCache, loaded_model, model_cache, release_models
from ._checkpoint import Checkpoint
from ._digests import check_finite, digest_json, file_digest, fingerprint_model, fingerprint_tokenizer, stamp
from ._files import Weights, read_config_json, read_json, resolve
from ._loading import auto_class, empty_model, known_dtype, load_model, load_tokenizer, module_order, placed
from ._memory import free_ram, ram
from ._meter import METER
from ._modules import ATTENTION, DOWN, GATE_UP, MLP, ROLES, Dimensions, Module, Role, StandardRole
from ._pairing import Batch, TextBatch, length_batches, paired_positions, text_batches
from ._paths import is_directory, is_file
from ._proposal import propose
from ._rendering import row_environment
from ._settings import LoadSettings
from ._streamed import streamed_base, unstreamed
from ._streaming import LayerStream, StreamedBase
from ._template_limits import Rendering, beyond_limits, chat_values, check_chat_template, rendered
from ._tracing import ActivationRecorder, LoadedBase, Place, linear_modules, main_stream, put_weights
from ._vocabulary import CommonTokens, TokenBytes, common_tokens, convention, surface
from ._yaml import check_aliases, parse_yaml, read_yaml

__all__ = [
    "ATTENTION",
    "BUILT_IN",
    "DOWN",
    "GATE_UP",
    "METER",
    "MLP",
    "ROLES",
    "ActivationRecorder",
    "Architecture",
    "Batch",
    "Checkpoint",
    "CommonTokens",
    "Dimensions",
    "LayerStream",
    "LoadSettings",
    "LoadedBase",
    "ModelCache",
    "Module",
    "Place",
    "Rendering",
    "Role",
    "StandardRole",
    "StreamedBase",
    "TextBatch",
    "TokenBytes",
    "Weights",
    "add_architectures",
    "architecture_for",
    "architectures",
    "auto_class",
    "beyond_limits",
    "chat_values",
    "check_aliases",
    "check_chat_template",
    "check_finite",
    "common_tokens",
    "convention",
    "digest_json",
    "empty_model",
    "file_digest",
    "fingerprint_model",
    "fingerprint_tokenizer",
    "free_ram",
    "in_order",
    "is_directory",
    "is_file",
    "known_dtype",
    "length_batches",
    "linear_modules",
    "load",
    "load_model",
    "load_tokenizer",
    "loaded_model",
    "main_stream",
    "model_cache",
    "module_order",
    "paired_positions",
    "parse_yaml",
    "placed",
    "propose",
    "put_weights",
    "ram",
    "read_config_json",
    "read_json",
    "read_yaml",
    "release_models",
    "rendered",
    "resolve",
    "row_environment",
    "stamp",
    "streamed_base",
    "surface",
    "text_batches",
    "unstreamed",
]
