"""What compressed-tensors takes for arguments: our rules beside the library's own class, value by value."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import pytest

from mimoquant.serving.arguments import KNOWN_ARGUMENTS, STRICT_ORDERS, ArgumentsError, read_arguments

PRESETS: list[dict[str, Any]] = [
    {},
    {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group"},
    {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
    {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
]
VALUES: dict[str, list[Any]] = {
    "num_bits": [4, "4", "x", None, 4.0, 4.5, 3, True],
    "type": ["int", "Float", "bfloat", None, 3],
    "symmetric": [False, None, "true", "No", "maybe", 1, 2],
    "group_size": [None, 128, "128", 128.0, -1, 0, -2, True, [1]],
    "strategy": [None, "GROUP", "tensor", "channel", "token", "block", "tensor_group", "attn_head", "x", 3],
    "block_structure": [None, [128, 128], [1], "2x4", "x", [128.0, 128], {}],
    "dynamic": [False, True, None, "LOCAL", "x", 1, "true"],
    "actorder": [None, True, False, "group", "weight", "Weight", "static", "dynamic", "", 0, 1],
    "scale_dtype": [None, "torch.bfloat16", "bfloat17", "float8_e8m0fnu", 3],
    "zp_dtype": [None, "int8", "torch.x"],
    "observer": [None, "mine", 3],
    "observer_kwargs": [{"a": 1}, None],
    "odd": [1],
}


def theirs(given: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the library reads; None where it stops."""
    from compressed_tensors.quantization import QuantizationArgs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = QuantizationArgs.model_validate(json.loads(json.dumps(given)))
        except Exception:  # of validation, and what its own rules raise
            return None
    block = tuple(read.block_structure) if read.block_structure else None
    kind, strategy, dynamic, order = (
        getattr(value, "value", value) for value in (read.type, read.strategy, read.dynamic, read.actorder)
    )
    order = "weight" if order == "static" else order or None
    return read.num_bits, kind, read.symmetric, read.group_size, strategy, block, dynamic, order


def ours(given: dict[str, Any]) -> tuple[Any, ...] | None:
    try:
        read = read_arguments(given)
    except ArgumentsError:
        return None
    order = given.get("actorder")
    if read.actorder and order not in STRICT_ORDERS:  # which 0.17 takes, and the installed one does not
        return None
    return (
        *(read.num_bits, read.type, read.symmetric, read.group_size, read.strategy, read.block_structure),
        *(read.dynamic, read.actorder),
    )


def test_the_library_takes_the_same_and_reads_the_same() -> None:
    pytest.importorskip("compressed_tensors")
    singles = [{**preset, key: value} for preset in PRESETS for key, values in VALUES.items() for value in values]
    pairs = [
        {**PRESETS[1], "strategy": strategy, "group_size": size, key: value}
        for strategy, size in itertools.product(VALUES["strategy"], VALUES["group_size"])
        for key, value in (("dynamic", True), ("dynamic", "local"), ("actorder", "weight"), ("block_structure", [1, 2]))
    ]
    for given in singles + pairs:
        if given.get("actorder") not in (0, 1) or isinstance(given.get("actorder"), bool | None):
            assert ours(given) == theirs(given), given


def test_the_arguments_are_those_that_compressed_tensors_takes() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    assert set(quantization.QuantizationArgs.model_fields) == KNOWN_ARGUMENTS
    assert quantization.QuantizationArgs.model_config["extra"] == "forbid"
