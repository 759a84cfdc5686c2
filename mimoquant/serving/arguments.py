"""What compressed-tensors takes for the arguments of weights or activations (`QuantizationArgs`), and makes of them.

Key idea: loading the library costs seconds, and `launch` reads headers only; so its rules stand here once more, and
`tests/serving/test_arguments.py` holds them to the library, value by value.
Left out: `observer_kwargs`' content, and what of a scheme depends on more than one of its parts.
Reference: compressed-tensors 0.17, which vLLM 0.32 and SGLang 0.5.23 read with; 0.19 differs by `STRICT_ORDERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TYPES = ("int", "float")
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
ORDERS = ("group", "weight", "dynamic", "static")
STRICT_ORDERS = ("weight", "static")  # that compressed-tensors 0.19 takes, in no other letters
KNOWN_ARGUMENTS = frozenset(
    ("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype")
) | {"zp_dtype", "observer", "observer_kwargs"}
_DYNAMIC = ("token", "tensor", "tensor_group", "group")  # strategies of what is rounded as it comes
_TRUE, _FALSE = ("1", "t", "true", "y", "yes", "on"), ("0", "f", "false", "n", "no", "off")
_SIZES = {
    "uint": ("8", "16", "32", "64"),
    "int": ("", "8", "16", "32", "64"),
    "float": ("", "16", "32", "64", "8_e4m3fn", "8_e5m2", "8_e4m3fnuz", "8_e5m2fnuz", "8_e8m0fnu", "4_e2m1fn_x2"),
    "complex": ("32", "64", "128"),
}
_DTYPES = frozenset(f"{kind}{size}" for kind, sizes in _SIZES.items() for size in sizes) | {
    *("bool", "short", "long", "half", "bfloat16", "double", "chalf", "cfloat", "cdouble"),
    *("quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
}


class ArgumentsError(ValueError):
    """What the library does not take, as the end of a sentence that begins with its place."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """As the library reads them, its defaults filled in; `actorder` as its own alias tells it."""

    num_bits: int
    type: str
    symmetric: bool
    group_size: int | None
    strategy: str
    block_structure: tuple[int, int] | None
    dynamic: bool | str
    actorder: str | None


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Raises ArgumentsError where the library stops."""
    if odd := sorted(given.keys() - KNOWN_ARGUMENTS):
        raise ArgumentsError(f" has {', '.join(odd)}, which QuantizationArgs does not take")
    bits, group = _integer(given, "num_bits", 8), _group_size(given)
    kind, strategy = _named(given, "type", TYPES) or "int", _named(given, "strategy", STRATEGIES)
    if given.get("type", "") is None:
        raise ArgumentsError(".type is None")
    symmetric, dynamic = _flag(given, "symmetric", True), _dynamic(given)
    block, order = _block(given.get("block_structure")), _order(given.get("actorder"))
    for key in ("scale_dtype", "zp_dtype"):
        name = given.get(key)
        if name is not None and not (isinstance(name, str) and name.removeprefix("torch.") in _DTYPES):
            raise ArgumentsError(f".{key} is {name!r}, no dtype of torch")
    if not isinstance(given.get("observer", ""), str | None) or not isinstance(given.get("observer_kwargs", {}), dict):
        raise ArgumentsError(".observer must be a name, its observer_kwargs an object")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    made = Arguments(bits, kind, symmetric, group, strategy, block, dynamic, order)
    _check_together(made, given)
    return made


def _check_together(made: Arguments, given: Mapping[str, Any]) -> None:
    grouped = made.strategy in ("group", "tensor_group")
    if grouped and (made.group_size or 0) <= 0:
        raise ArgumentsError(f" has strategy {made.strategy} and group_size {made.group_size}")
    if not grouped and (made.group_size or 0) > 0:
        raise ArgumentsError(f" has group_size {made.group_size}, and its strategy is {made.strategy}")
    if made.strategy == "token" and not made.dynamic:
        raise ArgumentsError(" has strategy token, and is not dynamic")
    if (made.strategy == "block") != (made.block_structure is not None):
        raise ArgumentsError(
            f" has a block_structure, and its strategy is {made.strategy}, no block"
            if made.block_structure
            else " has strategy block and no block_structure"
        )
    if made.dynamic and (made.strategy not in _DYNAMIC or (made.dynamic == "local" and not made.strategy[6:])):
        raise ArgumentsError(f" is dynamic ({made.dynamic}) by strategy {made.strategy}")
    if made.actorder == "group" and not grouped:
        raise ArgumentsError(f" has actorder group, and its strategy is {made.strategy}")
    if made.type == "float" and made.num_bits not in (4, 8) and given.get("zp_dtype") is None:
        raise ArgumentsError(f" is float of {made.num_bits} bits")


def _integer(given: Mapping[str, Any], key: str, default: int) -> int:
    value = given.get(key, default)
    try:
        if isinstance(value, str | int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
    except ValueError:
        pass
    raise ArgumentsError(f".{key} is {value!r}, no number")


def _group_size(given: Mapping[str, Any]) -> int | None:
    value = given.get("group_size")
    if value is None:
        return None
    if isinstance(value, str):  # which the library compares with a number first
        raise ArgumentsError(f".group_size is {value!r}, text")
    size = _integer(given, "group_size", 0)
    if size < -1 or (size == 0 and given.get("strategy") is None):
        raise ArgumentsError(f".group_size is {size}")
    return size


def _named(given: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str | None:
    value = given.get(key)
    if value is None:
        return None
    if not (isinstance(value, str) and value.lower() in known):
        raise ArgumentsError(f".{key} is {value!r}, known are {', '.join(known)}")
    return value.lower()


def _flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise ArgumentsError(f".{key} is {value!r}, neither true nor false")


def _dynamic(given: Mapping[str, Any]) -> bool | str:
    value = given.get("dynamic", False)
    if not isinstance(value, str):
        return _flag(given, "dynamic", False)
    if value.lower() != "local":
        raise ArgumentsError(f".dynamic is {value!r}")
    return "local"


def _order(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return "group" if value else None
    if value in (0, 1):  # a number stays one, which is no order
        return None
    if not (isinstance(value, str) and value.lower() in ORDERS):
        raise ArgumentsError(f".actorder is {value!r}")
    return {"dynamic": "group", "static": "weight"}.get(value.lower(), value.lower())


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    try:
        height, width = (int(side) if isinstance(value, str) else side for side in sides)
    except (TypeError, ValueError):
        height = width = None
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ArgumentsError(f".block_structure is {value!r}, no pair of numbers")
    return height, width
