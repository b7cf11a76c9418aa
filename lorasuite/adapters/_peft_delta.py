"""ΔW of adapters that are not factored, as PEFT itself computes it: one module in memory at a time.

PEFT's classes want a model to live in. They get a skeleton: linear modules under the right names, whose weights take no
memory until one is needed. No base model is loaded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasuite.adapters._kinds import SHARED
from lorasuite.adapters._lowrank import LowRank
from lorasuite.errors import AdapterError, Problem

#: ``(out, in)`` of a weight.
Shape = tuple[int, int]


class DeltaReader:
    """Reads ``ΔW`` of one module after another of a saved adapter."""

    def __init__(
        self,
        config: Mapping[str, Any],
        modules: Sequence[str],
        names: Sequence[str],
        tensor: Callable[[str], Tensor],
        where: str,
    ) -> None:
        """Of an adapter that :func:`config_problems` has nothing against.

        Args:
            config: the adapter's PEFT config, as JSON gives it.
            modules: paths of the modules it updates, in the model's order where the method numbers them.
            names: of its tensors, without the ``base_model.model.`` prefix of those inside a module.
            tensor: reads one of them.
            where: what to call the adapter in messages.
        """
        self.modules, self.where = tuple(modules), where
        self._config = _peft_config(config)
        self._names, self._tensor = names, tensor
        self._shared = str(config["peft_type"]).upper() in SHARED
        self._model: Any = None

    def read(
        self, module: str, shape: Callable[[str], Shape], weight: Tensor | None, bias: Tensor | None = None
    ) -> LowRank:
        """The exact update of one module, as the SVD of its dense ``ΔW (out, in)``.

        Args:
            shape: gives ``(out, in)`` of a module of the old base.
            weight: the module's weight ``(out, in)`` float32, for the methods of :func:`needs_weights`.
            bias: the module's bias ``(out,)``, for the methods of :data:`BIASED`.

        Raises:
            AdapterError: if the stored tensors do not fit the module.
        """
        # Zeros are enough where the weight does not count, and then the merged weight *is* ΔW.
        before = torch.zeros(shape(module)) if weight is None else weight.float()
        shapes = {path: shape(path) for path in self.modules} if self._shared else {}
        return LowRank.from_dense(self._merged(module, shapes, before, bias)[0] - before)

    def bias_change(self, module: str, weight: Tensor, bias: Tensor) -> Tensor | None:
        """What is added to the bias ``(out,)`` of a module of one of the methods :data:`BIASED`; None if nothing is."""
        change = self._merged(module, {}, weight.float(), bias)[1].double() - bias.double()
        return change if bool(change.any()) else None

    def _merged(
        self, module: str, shapes: Mapping[str, Shape], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The module's weight and bias with the adapter in them, as PEFT merges it."""
        model = self._built(shapes, module, weight, bias)
        layer = model.base_model.model.get_submodule(module)
        base = layer.get_base_layer()
        holder = base.weight
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        try:
            with torch.no_grad():
                layer.merge()
            return base.weight.detach(), torch.empty(0) if bias is None else base.bias.detach()
        finally:
            layer.merged_adapters.clear()
            base.weight = holder

    def _built(self, shapes: Mapping[str, Shape], module: str, weight: Tensor, bias: Tensor | None) -> Any:
        """The skeleton with the adapter in it: of all modules (kept) where they share tensors, else of one."""
        if shapes:
            if self._model is None:
                # One zero seen through strides of zero: (out, in) for PEFT, four bytes in memory.
                empty = {path: torch.zeros(1).expand(out, inner) for path, (out, inner) in shapes.items()}
                self._model = self._wrap(empty)
            return self._model
        return self._wrap({module: weight}, bias)

    def _wrap(self, weights: Mapping[str, Tensor], bias: Tensor | None = None) -> Any:
        """A skeleton with these weights and the adapter's tensors; AdapterError where they do not fit."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        config = copy.deepcopy(self._config)
        config.target_modules = sorted(weights)
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            if hasattr(config, name):
                setattr(config, name, None)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of a model without a config, and of weights to come
            model = get_peft_model(_skeleton(weights, bias), config)
            expected = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()}
            state = {name: self._tensor(name) for name in self._names if name in expected}
            wrong = [
                Problem(
                    self.where,
                    f"{name} is {tuple(state[name].shape) if name in state else 'missing'}, {wanted} fits the old base",
                    "The adapter was trained on another base, or the file is damaged.",
                )
                for name, wanted in expected.items()
                if name not in state or tuple(state[name].shape) != wanted
            ]
            if wrong:
                raise AdapterError(wrong)
            set_peft_model_state_dict(model, state)
        return model.eval()


def _peft_config(config: Mapping[str, Any]) -> Any:
    """The PEFT config object; fields of other PEFT versions are left out (the caller has refused those that count)."""
    from dataclasses import fields

    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[str(config["peft_type"]).upper()]]
    known = {field.name for field in fields(cls)}
    values = {name: value for name, value in config.items() if name in known and name != "task_type"}
    return cls(**{**values, "inference_mode": True, "base_model_name_or_path": None})


def _skeleton(weights: Mapping[str, Tensor], bias: Tensor | None) -> nn.Module:
    """Linear modules under their full names, and nothing else; the only one with its bias, if that is given."""
    root = nn.Module()
    for path, weight in weights.items():
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
        module.add_module(leaf, linear)
    return root
