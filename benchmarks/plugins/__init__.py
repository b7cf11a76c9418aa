"""Transforms and sources of prompts that are measured here and not offered: controls, and what others do better than.

They are plugins of the registry, as a transform of any other package is. A benchmark makes them available by
:func:`register_plugins`. ``python -m benchmarks.plugins`` is the command line ``lorasuite`` with them::

    python -m benchmarks.plugins migrate --method random --adapter …

An installed package would name its own in the entry-point group ``lorasuite.transforms`` in place of that call
(docs/transfer.md).
"""

from benchmarks.plugins.controls import Random, TargetMean
from benchmarks.plugins.functional_ridge import FunctionalRidge
from benchmarks.plugins.general_prompts import GeneralPrompts
from benchmarks.plugins.logits import Logits
from benchmarks.plugins.relative_norm import LoRASuiteRelative
from lorasuite.teacher import register_source
from lorasuite.transforms import register

__all__ = [
    "FunctionalRidge",
    "GeneralPrompts",
    "LoRASuiteRelative",
    "Logits",
    "Random",
    "TargetMean",
    "register_plugins",
]


def register_plugins() -> None:
    """Make every transform and source of this package available by its name. Harmless if done before."""
    for plugin in (FunctionalRidge, Logits, LoRASuiteRelative, Random, TargetMean):
        register(plugin)
    register_source(GeneralPrompts())
