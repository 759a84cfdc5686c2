"""The parts of a recipe that only calibrated runs have: the tokens, GPTQ's and AWQ's own settings.

Key idea: as in `recipe`, what is unknown or would be dropped is refused by name; and so is what goes wrong on this
family, such as scaling a norm without its router.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, Protocol, cast

from mimoquant.errors import RecipeError
from mimoquant.planning.documents import CalibrationSettings
from mimoquant.shipped import CALIBRATION_SET

DAMP = 0.05  # of the mean Gram diagonal; llm-compressor issue 2922 found it best for FP4, its own default is .01
AWQ_GRID = 20
MODIFIER_DEFAULTS: dict[str, dict[str, Any]] = {
    "GPTQModifier": {"dampening_frac": DAMP, "actorder": "static"},
    "AWQModifier": {"n_grid": AWQ_GRID, "duo_scaling": True},
}
MOST_REPETITIONS, MOST_GROUPS = 5, 20  # of a pattern
MOST_TOKENS, MOST_DRAWS = 2**31, 64  # that are walked back
_DRAWS, _DRAWS_OF_FEW, _FEW_SAMPLES = 2, 8, 2 * 16_384
OBJECTIVES = ("kl", "output")
_CALIBRATION_KEYS = (
    "set",
    "data",
    "column",
    "sequences",
    "tokens",
    "propagate",
    "shrinkage",
    "max_starved_experts",
    "reconstruct",
    "reconstruct_layers",
    "fisher",
)


class Fail(Protocol):
    """Raises RecipeError with the recipe's name before the problem."""

    def __call__(self, problem: str, hint: str | None = None) -> NoReturn: ...


def check_pattern(pattern: str) -> None:
    """Raises re.error for a pattern that is broken or could try a name for hours: repeated groups, many repeats; or
    whose groups lie too deep to be read."""
    if pattern.count("(") > MOST_GROUPS:
        raise re.error(f"it has more than {MOST_GROUPS} groups")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a later Python may read otherwise; targets are told by the plan
        re.compile(pattern)
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    if re.search(r"\)[*+{]", bare):
        raise re.error("a group is repeated")
    if len(re.findall(r"[*+{]", bare)) > MOST_REPETITIONS:
        raise re.error(f"it has more than {MOST_REPETITIONS} repetitions")


def match_name(name: str, pattern: str) -> bool:
    """compressed-tensors' rule: `re:` matches from the start (not to the end), anything else is the whole name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern


@dataclass(frozen=True, slots=True)
class FisherSample:
    """What Fisher matrices are measured on: the first sequences that make up `tokens` tokens, with `draws` labels drawn
    at each position; None for as many as `Calibration.fisher_draws` says."""

    tokens: int = 131_072
    draws: int | None = None


@dataclass(frozen=True)
class Calibration:
    """What a calibrated run sees and does with it. `data`: shipped sets, files or folders (see `calibration.tokens`).
    `column`: of their records, only that is read.

    shrinkage: how far thin statistics are shrunk, n0 over the width; None lets held-out tokens choose, layer by layer.
    max_starved_experts: more experts than this, in a layer, with fewer tokens than half the width are an error.
    reconstruct: rounds in which gate, up and down of an expert are chosen together at the end; reconstruct_layers: in
    which layers, () for all. fisher: with it, codes are chosen for the loss, and not for a projection's own output.
    """

    data: tuple[str, ...] = (CALIBRATION_SET,)
    sequences: int = 512
    tokens: int = 2048
    propagate: str = "quantized"
    shrinkage: float | None = None
    max_starved_experts: int | None = None
    reconstruct: int = 0
    reconstruct_layers: tuple[int, ...] = ()
    column: str | None = None
    fisher: FisherSample | None = None

    @property
    def fisher_sequences(self) -> int:
        """The first sequences, that are walked back; one at least."""
        assert self.fisher is not None
        return max(1, min(self.sequences, self.fisher.tokens // self.tokens))

    @property
    def fisher_draws(self) -> int:
        """Labels at each position. The noise of a matrix falls with tokens times draws, and so does the walk's cost
        grow: few tokens have more draws, for what two take of 16,384 tokens."""
        assert self.fisher is not None
        if self.fisher.draws is not None:
            return self.fisher.draws
        return max(_DRAWS, min(_DRAWS_OF_FEW, _FEW_SAMPLES // (self.fisher_sequences * self.tokens)))

    def reconstructs(self, layer: int) -> bool:
        return self.reconstruct > 0 and (not self.reconstruct_layers or layer in self.reconstruct_layers)

    def as_plain(self) -> CalibrationSettings:
        named: dict[str, Any] = {"set": self.data[0]} if len(self.data) == 1 else {"data": list(self.data)}
        if self.column is not None:
            named["column"] = self.column
        rounds: dict[str, Any] = {"reconstruct": self.reconstruct} if self.reconstruct else {}
        if self.reconstruct and self.reconstruct_layers:
            rounds["reconstruct_layers"] = list(self.reconstruct_layers)
        settings = {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "propagate": self.propagate,
            "shrinkage": "auto" if self.shrinkage is None else self.shrinkage,
            "max_starved_experts": self.max_starved_experts,
        }
        walked = {"fisher": asdict(self.fisher) | {"draws": self.fisher_draws}} if self.fisher else {}
        return cast(CalibrationSettings, named | settings | rounds | walked)


@dataclass(frozen=True)
class Awq:
    """AWQModifier's settings. `down`: up_proj is scaled against down_proj; `norms`: patterns of the norms that are."""

    n_grid: int
    duo: bool
    down: bool
    norms: tuple[str, ...]

    @staticmethod
    def of(settings: dict[str, Any]) -> Awq:
        smoothed = [mapping["smooth_layer"] for mapping in settings.get("mappings") or []]
        ups = [pattern for pattern in smoothed if match_name(_MODULES["up"], pattern)]
        norms = tuple(pattern for pattern in smoothed if pattern not in ups)
        return Awq(
            int(settings.get("n_grid", AWQ_GRID)),
            bool(settings.get("duo_scaling", True)),
            bool(ups) or not smoothed,
            norms,
        )

    def names_norm(self, layer: int) -> bool:
        return any(match_name(_norm(layer), pattern) for pattern in self.norms)


_MODULES = {
    "router": "model.layers.1.mlp.gate",
    "gate": "model.layers.1.mlp.experts.0.gate_proj",
    "up": "model.layers.1.mlp.experts.0.up_proj",
    "down": "model.layers.1.mlp.experts.0.down_proj",
}


def _norm(layer: int) -> str:
    return f"model.layers.{layer}.post_attention_layernorm"


def parse_calibration(block: Any, objective: Any, fail: Fail) -> Calibration | None:
    """The `calibration:` block, and the objective, which says whether anything is walked back."""
    if objective not in OBJECTIVES:
        fail(f"objective {objective!r} is unknown", f"known are {', '.join(OBJECTIVES)}")
    if block is None:
        return Calibration(fisher=FisherSample()) if objective == "kl" else None
    if not isinstance(block, dict):
        fail(f"calibration must be a mapping, found {type(block).__name__}")
    unknown = [key for key in block if key not in _CALIBRATION_KEYS]
    if unknown:
        fail(f"unknown key {unknown[0]!r} in calibration", f"known are {', '.join(sorted(_CALIBRATION_KEYS))}")
    default = Calibration()
    sizes = {key: block.get(key, getattr(default, key)) for key in ("sequences", "tokens")}
    for key, value in sizes.items():
        if type(value) is not int or value < (2 if key == "tokens" else 1):
            fail(f"calibration.{key} is {value!r}, expected a whole number from {2 if key == 'tokens' else 1} on")
    propagate, shrinkage = block.get("propagate", "quantized"), block.get("shrinkage", "auto")
    if propagate not in ("quantized", "original"):
        fail(f"calibration.propagate is {propagate!r}", "known are quantized, original")
    if shrinkage == "auto":
        shrinkage = None
    elif isinstance(shrinkage, bool) or not isinstance(shrinkage, int | float) or not 0 <= shrinkage < 1e6:
        fail(f"calibration.shrinkage is {shrinkage!r}, expected auto or a number")
    column = block.get("column")
    if column is not None and (not isinstance(column, str) or not column):
        fail(f"calibration.column is {column!r}, expected the name of a column")
    starved = block.get("max_starved_experts")
    if starved is not None and (type(starved) is not int or starved < 0):
        fail(f"calibration.max_starved_experts is {starved!r}, expected a number of experts")
    return Calibration(
        _data(block, fail) or default.data,
        sizes["sequences"],
        sizes["tokens"],
        propagate,
        shrinkage,
        starved,
        *_reconstruction(block, fail),
        column,
        _fisher(block.get("fisher"), objective, fail),
    )


def _reconstruction(block: dict[Any, Any], fail: Fail) -> tuple[int, tuple[int, ...]]:
    rounds, layers = block.get("reconstruct", 0), block.get("reconstruct_layers", [])
    if type(rounds) is not int or not 0 <= rounds <= 100:
        fail(f"calibration.reconstruct is {rounds!r}, expected a number of rounds")
    if not isinstance(layers, list) or any(type(layer) is not int or layer < 0 for layer in layers):
        fail(f"calibration.reconstruct_layers is {layers!r}, expected a list of layer numbers")
    if layers and not rounds:
        fail("calibration.reconstruct_layers is given and reconstruct is not", "say how many rounds, such as 1")
    return rounds, tuple(layers)


def _fisher(held: Any, objective: str, fail: Fail) -> FisherSample | None:
    if held is None:
        return FisherSample() if objective == "kl" else None
    if objective != "kl":
        fail(f"calibration.fisher is given, and the objective is {objective}", "add objective: kl")
    names = [field.name for field in fields(FisherSample)]
    if not isinstance(held, dict) or set(held) - set(names):
        fail(f"calibration.fisher is {held!r}, expected a mapping with {' and '.join(names)}")
    sample = FisherSample(**held)
    for name, most in (("tokens", MOST_TOKENS), ("draws", MOST_DRAWS)):
        value = getattr(sample, name)
        if name in held and (type(value) is not int or not 1 <= value <= most):
            fail(f"calibration.fisher.{name} is {value!r}, expected a number from 1 to {most}")
    return sample


def walked_for(objective: str, held: FisherSample | None, name: str) -> FisherSample | None:
    """What is walked back for an objective that a recipe is given, which may have said of what. Raises RecipeError."""
    if objective not in OBJECTIVES:
        raise RecipeError(
            f"recipe {name}: objective {objective!r} is unknown", hint=f"known are {', '.join(OBJECTIVES)}"
        )
    return (held or FisherSample()) if objective == "kl" else None


def _data(block: dict[Any, Any], fail: Fail) -> tuple[str, ...]:
    if "set" in block and "data" in block:
        fail("calibration has both set and data")
    held = block.get("set", block.get("data"))
    items = [held] if isinstance(held, str) else [] if held is None else held
    named = "set" in block or "data" in block
    if (
        not isinstance(items, list)
        or not all(isinstance(item, str) and item for item in items)
        or (named and not items)
    ):
        fail("calibration.data must be a list of shipped sets, files or folders")
    return tuple(items)


def check_settings(extra: dict[str, dict[str, Any]], fail: Fail) -> None:
    """Refuse settings of the calibrated modifiers that would be dropped or that go wrong on this family."""
    gptq, awq = extra.get("GPTQModifier", {}), extra.get("AWQModifier", {})
    damp = gptq.get("dampening_frac", DAMP)
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 < damp <= 1:
        hint = "YAML takes a number without a point, such as 1e-2, for a text: write 0.01"
        fail(
            f"dampening_frac is {damp!r}, expected a number above 0 and at most 1", hint if type(damp) is str else None
        )
    if gptq.get("actorder", "static") not in ("static", "weight"):
        fail(
            f"actorder {gptq['actorder']!r} is not supported",
            "columns are ordered by activation without an index in the file: static",
        )
    if gptq.get("block_size", 128) != 128:
        fail(f"block_size is {gptq['block_size']!r}; columns go in blocks of 128")
    grid = awq.get("n_grid", AWQ_GRID)
    if type(grid) is not int or not 1 <= grid <= 100:
        fail(f"n_grid is {grid!r}, expected a number from 1 to 100")
    if not isinstance(awq.get("duo_scaling", True), bool):
        fail(f"duo_scaling {awq['duo_scaling']!r} is not supported", "true or false")
    for number, mapping in enumerate(awq.get("mappings") or []):
        _check_mapping(mapping, number, fail)


def _check_mapping(mapping: Any, number: int, fail: Fail) -> None:
    """Two kinds exist here: up_proj → down_proj, and the norm → router, gate_proj and up_proj, all three of them."""
    smooth = mapping.get("smooth_layer") if isinstance(mapping, dict) else None
    balanced = mapping.get("balance_layers") if isinstance(mapping, dict) else None
    if not isinstance(smooth, str) or not isinstance(balanced, list):
        fail(f"mapping {number} is not smooth_layer (a pattern) and balance_layers (a list of patterns)")
    for key in mapping:
        if key not in ("smooth_layer", "balance_layers"):
            fail(f"mapping {number} has {key}: {repr(mapping[key])[:80]}, which is not supported", "leave it out")
    for pattern in (smooth, *balanced):
        try:
            check_pattern(str(pattern).removeprefix("re:"))
        except re.error as error:
            fail(f"mapping {number} has the broken pattern {pattern!r} ({error})")
    layers = [layer for layer in range(128) if match_name(_norm(layer), smooth)]
    if layers and all(_found(layer, balanced) == {"router", "gate", "up"} for layer in layers):
        return
    if layers and any("router" not in _found(layer, balanced) for layer in layers):
        fail(
            f"mapping {number} scales post_attention_layernorm and leaves the router (mlp.gate) as it is",
            r"the router would see other inputs and choose other experts: add 're:.*mlp\.gate$'",
        )
    ups = [(layer, expert) for layer in (1, 2, 30, 69) for expert in (0, 1, 17, 255)]
    named = [match_name(f"model.layers.{n}.mlp.experts.{e}.up_proj", smooth) for n, e in ups]
    if layers or not all(named) or any(_found(layer, balanced) != {"down"} for layer, _ in ups):
        fail(
            f"mapping {number} ({smooth}) is not supported",
            "known are up_proj to down_proj, of all layers and experts, and post_attention_layernorm to mlp.gate, "
            "gate_proj and up_proj of the same layers",
        )


def _found(layer: int, patterns: list[Any]) -> set[str]:
    """The kinds of module of a layer that the patterns name."""
    names = {kind: name.replace("layers.1.", f"layers.{layer}.") for kind, name in _MODULES.items()}
    return {kind for kind, name in names.items() if any(match_name(name, str(pattern)) for pattern in patterns)}
