"""Blocks of SHA-256 of one or two byte streams, by the processor's own instructions for it (x86: SHA-NI).

Key idea: a stream's rounds wait for each other, so one stream leaves the unit idle half of the time; with a round of
another between, two are hashed in 1.1 times the time of one. No library offers that, so the blocks' loop is written
here; `machine.hashing` does the rest.

A state is uint32 [8], in the order in which the instructions want it: F E B A, H G D C.

Left out: padding; other processors, which `IS_THERE` tells. Reference: FIPS 180-4.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from mimoquant.quant.kernels.compiled import compiled

BLOCK_BYTES = 64
_config: Any = numba.config
_in_place: Any = intrinsic
# The compiler makes the instructions only for a processor that it knows to have them, and ends the process otherwise.
IS_THERE = bool(
    llvmlite.binding.get_host_cpu_features().get("sha")
    and _config.CPU_NAME is None
    and _config.CPU_FEATURES is None
    and not _config.DISABLE_JIT
)
_PLACES = (5, 4, 1, 0, 7, 6, 3, 2)  # of a state's words among A to H
_FOUR = ir.VectorType(ir.IntType(32), 4)


def _primes(count: int) -> list[int]:
    return [number for number in range(2, 400) if all(number % divisor for divisor in range(2, number))][:count]


def _cube_root(number: int) -> int:
    low, high = 0, number
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**3 <= number else (low, middle - 1)
    return low


_START = [math.isqrt(prime << 64) & 0xFFFFFFFF for prime in _primes(8)]  # of square roots 32 bits behind the point
_ROUNDS = [_cube_root(prime << 96) & 0xFFFFFFFF for prime in _primes(64)]  # the same of cube roots


def new_state() -> npt.NDArray[np.uint32]:
    return np.array([_START[place] for place in _PLACES], np.uint32)


def digest_of(state: npt.NDArray[np.uint32]) -> bytes:
    words = np.empty(8, ">u4")
    words[list(_PLACES)] = state
    return words.tobytes()


def _emit(builder: Any, states: list[Any], data: list[Any], blocks: Any) -> None:
    """The loop over blocks. All but `blocks` are addresses, one of each kind a stream."""
    pointers = [builder.inttoptr(state, _FOUR.as_pointer()) for state in states]
    halves = [[builder.gep(pointer, [ir.Constant(ir.IntType(64), half)]) for half in (0, 1)] for pointer in pointers]
    held = [[cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in pair] for pair in halves]
    with cgutils.for_range(builder, blocks) as loop:
        begin = builder.mul(loop.index, ir.Constant(loop.index.type, BLOCK_BYTES))
        before = [[builder.load(slot) for slot in slots] for slots in held]
        texts = [builder.inttoptr(builder.add(address, begin), _FOUR.as_pointer()) for address in data]
        after = _compressed(builder, before, texts)
        for slots, old, new in zip(held, before, after, strict=True):
            for slot, one, other in zip(slots, old, new, strict=True):
                builder.store(builder.add(one, other), slot)
    for pair, slots in zip(halves, held, strict=True):
        for place, slot in zip(pair, slots, strict=True):
            builder.store(builder.load(slot), place, align=4)


def _compressed(builder: Any, before: list[list[Any]], texts: list[Any]) -> list[list[Any]]:
    """What 64 rounds make of the states, four rounds of each stream in turn."""

    def call(name: str, *given: Any) -> Any:
        kind = ir.FunctionType(_FOUR, [one.type for one in given])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), given)

    def shuffled(low: Any, high: Any, places: tuple[int, ...]) -> Any:
        return builder.shuffle_vector(low, high, ir.Constant(_FOUR, places))

    after, words = [list(pair) for pair in before], [_words(builder, call, text) for text in texts]
    for four in range(16):
        added = ir.Constant(_FOUR, _ROUNDS[4 * four : 4 * four + 4])
        for pair, held in zip(after, words, strict=True):
            if four >= 4:
                first, second, third, last = held
                sums = builder.add(call("x86.sha256msg1", first, second), shuffled(third, last, (1, 2, 3, 4)))
                held[:] = [second, third, last, call("x86.sha256msg2", sums, last)]
            turn = builder.add(held[four] if four < 4 else held[3], added)
            pair[1] = call("x86.sha256rnds2", pair[1], pair[0], turn)
            pair[0] = call("x86.sha256rnds2", pair[0], pair[1], shuffled(turn, turn, (2, 3, 2, 3)))
    return after


def _words(builder: Any, call: Any, text: Any) -> list[Any]:
    """A block's sixteen words, stored with the highest byte first."""
    places = [builder.gep(text, [ir.Constant(ir.IntType(64), four)]) for four in range(4)]
    return [call("bswap.v4i32", builder.load(place, align=1)) for place in places]


def _generator(streams: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *addresses, blocks = args
        _emit(builder, addresses[:streams], addresses[streams:], blocks)
        return context.get_dummy_value()

    return types.void(*[types.intp] * (2 * streams + 1)), codegen


@_in_place
def _compress_one(typing, state, data, blocks):
    return _generator(1)


@_in_place
def _compress_two(typing, state, other_state, data, other_data, blocks):
    return _generator(2)


_jit = compiled()


@_jit
def hash_one(state, data, blocks):
    """So many blocks at the address `data` into the state at the address `state`."""
    _compress_one(state, data, blocks)


@_jit
def hash_two(state, other_state, data, other_data, blocks):
    """The same of two streams, so many blocks of each."""
    _compress_two(state, other_state, data, other_data, blocks)
