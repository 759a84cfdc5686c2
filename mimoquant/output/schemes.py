"""What compressed-tensors makes of a `quantization_config`: which modules it quantizes, and as which tensors.

Key idea: its own classes parse the config, its own functions match names, and its own compressors, run on the meta
device, say which tensors a module has then; nothing of it is repeated here. It has to stay quick for the 80 000 modules
of the largest model, so each pattern goes over all names once, and what is common to many modules is asked once: a
pattern that does not match a module changes nothing about it, whatever the library does with it.
Left out: activations and KV caches, which are no part of a stored weight.
Reference: compressed-tensors 0.17 to 0.20, `apply_quantization_config` and `ModelCompressor.compress_model`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.utils.match import is_match, match_name, match_targets
from loguru import logger

from mimoquant.calibration.tokenizer import one_line
from mimoquant.checkpoint.index import TensorInfo

NAME = f"compressed-tensors {compressed_tensors.__version__}"
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # what follows the module's name → dtype, shape
_DTYPES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
# dtypes that are read as one another: loaders cast plain floats and shapes, and an exponent is a byte
_ALIKE = ({"BF16", "F16", "F32"}, {"I32", "I64"}, {"U8", "F8_E8M0"})
_PLAIN = ("BF16", "F16", "F32")


class Schemes:
    """A parsed `quantization_config`. Raises what compressed-tensors raises of it."""

    def __init__(self, quantization: dict[str, Any]) -> None:
        logger.disable(compressed_tensors.__name__)  # what it warns of there is told as a difference of shapes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = QuantizationConfig.model_validate(quantization)
        self._ignore: list[str] = config.ignore or []
        self._of_target: dict[str, tuple[str, QuantizationScheme]] = {}  # of equal targets the last, as there
        for group, scheme in config.config_groups.items():
            for target in scheme.targets:
                self._of_target[target] = (group, scheme)
        self._linear = torch.nn.Linear(1, 1, bias=False, device="meta")
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensors] = {}

    def groups(self, names: list[str]) -> dict[str, str | None]:
        """Linear module → the config group whose scheme it gets; None: it is left as it is."""
        targets, ignored = self._matching(self._of_target, names), self._matching(self._ignore, names)
        known: dict[tuple[tuple[str, ...], tuple[str, ...]], str | None] = {}
        found: dict[str, str | None] = {}
        for name in names:
            key = (tuple(targets[name]), tuple(ignored[name]))
            if key not in known:
                known[key] = self._group(name, *key)
            found[name] = known[key]
        return found

    def _matching(self, patterns: Iterable[str], names: list[str]) -> dict[str, list[str]]:
        """Module → those of `patterns` that match it, in their order."""
        found: dict[str, list[str]] = {name: [] for name in names}
        for pattern in patterns:
            if pattern.startswith("re:"):
                matched: Iterable[str] = (name for name in names if match_name(name, pattern))
            elif is_match("", self._linear, pattern):  # the name of a class
                matched = names
            else:
                matched = (pattern,) if pattern in found else ()
            for name in matched:
                found[name].append(pattern)
        return found

    def _group(self, name: str, targets: tuple[str, ...], ignored: tuple[str, ...]) -> str | None:
        if not is_match(name, self._linear, targets, ignored):
            return None
        group, _ = self._of_target[match_targets(name, self._linear, targets)[0]]
        return group

    def tensors(self, group: str, shape: tuple[int, ...]) -> Tensors:
        """What is stored of a weight [out, in] that has a group's scheme. Raises what compressed-tensors raises."""
        key = (group, shape)
        if key not in self._tensors:
            scheme = next(scheme for name, scheme in self._of_target.values() if name == group)
            self._tensors[key] = _compressed(scheme.model_copy(deep=True), shape)
        return self._tensors[key]


def _compressed(scheme: QuantizationScheme, shape: tuple[int, ...]) -> Tensors:
    """A module of this shape as the library compresses it."""
    module = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    initialize_module_for_quantization(module, scheme, force_zero_point=False)
    compress_module(module)
    state = dict(module.state_dict())
    zero_point = state.get("weight_zero_point")
    if "weight_packed" in state and zero_point is not None and zero_point.dtype == torch.int8:
        # on the meta device it leaves this step out
        codes = torch.zeros(zero_point.shape, dtype=torch.int8)
        state["weight_zero_point"] = pack_to_int32(codes, scheme.weights.num_bits, packed_dim=0)
    return {name: (_DTYPES.get(value.dtype, str(value.dtype)), tuple(value.shape)) for name, value in state.items()}


def objection(error: Any) -> str:
    """An error of the library in one line; of a validation's the first place and what is said of it."""
    details = error.errors() if hasattr(error, "errors") else []
    if not details:
        return one_line(error)
    place = ".".join(str(part) for part in details[0]["loc"] if "[" not in str(part))
    return f"{place}: {' '.join(str(details[0]['msg']).split())}"


def difference(wanted: Tensors | None, stored: dict[str, TensorInfo]) -> str | None:
    """How what is stored of a module differs from what the library wants (None: the plain weight); None: not at all."""
    if wanted is None:
        if stored.keys() == {"weight"} and stored["weight"].dtype in _PLAIN:
            return None
        return f"leaves it as it is, stored are {_said(stored)}"
    for name, (dtype, shape) in wanted.items():
        info = stored.get(name)
        if info is None:
            return f"wants {name} {dtype}{list(shape)}, stored are {_said(stored)}"
        alike = dtype == info.dtype or any({dtype, info.dtype} <= kinds for kinds in _ALIKE)
        if not alike or (shape != info.shape and {shape, info.shape} != {(), (1,)}):
            return f"wants {name} {dtype}{list(shape)}, stored is {info.dtype}{list(info.shape)}"
    strange = sorted(name for name in stored.keys() - wanted.keys() if not name.startswith("input_"))
    return f"has no place for its {strange[0]}" if strange else None


def _said(stored: dict[str, TensorInfo]) -> str:
    return ", ".join(f"{name} {info.dtype}" for name, info in sorted(stored.items())) or "none"
