"""Recipe YAML ⇄ `Recipe`.

Key idea: a recipe is an llm-compressor recipe (stages, modifiers) plus one `mimoquant:` block that llm-compressor
ignores. It is read strictly: an unknown key, a value we do not know or a feature we lack is refused by name, because a
setting that is silently dropped gives a checkpoint that is not what its recipe says. `resolved` writes every default
out; reading that back gives the same recipe.

References: llm-compressor 0.14 recipe format; compressed-tensors 0.19 `QuantizationArgs`, preset schemes, `match_name`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from mimoquant.errors import RecipeError
from mimoquant.planning.calibration_settings import (
    DAMP,
    MODIFIER_DEFAULTS,
    Awq,
    Calibration,
    check_pattern,
    check_settings,
    match_name,
    parse_calibration,
    walked_for,
)
from mimoquant.planning.modifiers import (
    FORMAT_KEYS,
    METHODS,
    PRESETS,
    WEIGHT_DEFAULTS,
    rounds_inputs,
    settings_of,
    weight_format,
    weight_observer,
    without_empty,
    without_run_type,
)
from mimoquant.planning.output_settings import OUTPUT_KEYS, OutputSettings, check_chosen, parse_output_settings
from mimoquant.planning.strict_yaml import read_yaml
from mimoquant.quant.formats import SEARCHES, Format
from mimoquant.quant.method import Method
from mimoquant.shipped import recipes_folder, shipped_recipes
from mimoquant.weights.container import CONTAINERS, format_inputs, format_weights, scales_inputs

VERSION = 1
MAX_RECIPE_BYTES = 1_000_000
CARVE_OUTS = ("bf16", "fp8", "source")
_OBSERVERS = {
    "minmax": "absmax",
    "memoryless_minmax": "absmax",
    "static_minmax": "absmax",
    "mse": "mse",
    "memoryless_mse": "mse",
}
_BLOCK_KEYS = {
    "version",
    "scale_search",
    "container",
    "calibration",
    "carve_outs",
    "provenance",
    "fold",
    "refine",
    "signed_scales",
    *OUTPUT_KEYS,
    "objective",
}
# what the command line calls them
_OPTIONS = {"reconstruct": "refine", "reconstruct_layers": "refine-layer", "column": "data-column"}
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_FOLDS = ("pow2", "exact-real", "none")


@dataclass(frozen=True)
class Group:
    """Modules that share one format. `targets` are compressed-tensors patterns (`re:` prefix, else a whole name)."""

    name: str
    targets: tuple[str, ...]
    fmt: Format


@dataclass(frozen=True)
class Recipe:
    """What a run shall do, in full. `extra` keeps a calibrated modifier's own settings, as given."""

    name: str
    method: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    scale_search: str
    container: str | None = None
    carve_outs: dict[int, str] = field(default_factory=dict)
    calibration: Calibration | None = None
    fold: str = "pow2"  # what AWQ may scale channels by
    refine: int = 2  # rounds after GPTQ
    signed_scales: bool = True  # calibrated symmetric int4 may have negative scales
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # of the run that wrote this recipe, if one did
    output: OutputSettings = field(default_factory=OutputSettings)

    def group_of(self, module: str, ignored: bool) -> Group | None:
        """The group that claims `module`, or None where it is ignored or nobody does."""
        if ignored:
            return None
        claims = [group for group in self.groups if any(match_name(module, target) for target in group.targets)]
        if len(claims) > 1:
            names = " and ".join(group.name for group in claims)
            raise RecipeError(f"recipe {self.name}: {module} is claimed by the groups {names}")
        return claims[0] if claims else None

    @property
    def casts(self) -> bool:
        """Whether the source's experts are in 4 bits already, and go out with the same values."""
        return self.scale_search == "cast"

    @property
    def calibrated(self) -> bool:
        """Whether a run needs tokens."""
        return self.method != "rtn" or self.scale_search == "gram"

    def calibrated_on(self, changes: dict[str, Any]) -> Recipe:
        """The recipe with other calibration settings. Raises RecipeError where it calibrates on nothing."""
        if not changes:
            return self
        changes = dict(changes)
        objective = changes.pop("objective", None)
        if self.calibration is None:
            first = next(iter(changes))
            raise RecipeError(
                f"recipe {self.name}: needs no tokens, --{_OPTIONS.get(first, first)} cannot go with it",
                hint="leave it out, or choose a recipe that calibrates, such as gptq-int4-g128",
            )
        changed = replace(self, calibration=replace(self.calibration, **changes))
        return changed if objective is None else changed.rounded_for(objective)

    @property
    def objective(self) -> str:
        """What codes are chosen for: "kl", the loss, or "output", what a projection answers."""
        return "kl" if self.calibration is not None and self.calibration.fisher is not None else "output"

    def rounded_for(self, objective: str) -> Recipe:
        """The recipe with another objective. Raises RecipeError where its method has none."""
        if "gptq" not in self.method or self.calibration is None:
            raise RecipeError(
                f"recipe {self.name}: is of the method {self.method}, an objective has a meaning for GPTQModifier only",
                hint="choose a recipe with it, such as gptq-int4-g128",
            )
        walked = walked_for(objective, self.calibration.fisher, self.name)
        return replace(self, calibration=replace(self.calibration, fisher=walked))

    def stored_as(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other settings of its output. Raises UsageError for what is no repository's name."""
        return replace(self, output=replace(self.output, **check_chosen(changes)))

    def expert_method(self) -> Method:
        damp = float(self.extra.get("GPTQModifier", {}).get("dampening_frac", DAMP))
        return Method(self.scale_search, "gptq" in self.method, damp, self.refine, self.signed_scales)

    @property
    def awq(self) -> Awq:
        return Awq.of(self.extra.get("AWQModifier", {}))

    @property
    def real_fold(self) -> bool:
        """Whether AWQ's factors are real numbers, which what is stored is rounded for, rather than powers of two."""
        return self.fold == "exact-real"

    @property
    def folds_down(self) -> bool:
        """Whether up and down of an expert are scaled against each other."""
        return "awq" in self.method and self.fold != "none" and self.awq.down

    def folds_norm(self, layer: int) -> bool:
        """Whether the norm of a layer is scaled against its router and experts: only where a mapping asks for it."""
        return "awq" in self.method and self.fold != "none" and self.awq.names_norm(layer)

    def scales_inputs(self, fmt: Format) -> bool:
        """Whether experts of a format have input scales."""
        return scales_inputs(fmt, self.output.input_scales)

    def ignores(self, module: str) -> bool:
        return any(match_name(module, pattern) for pattern in self.ignore)

    def resolved(self, container: str) -> dict[str, Any]:
        """The recipe with every default written out, as plain data for YAML."""
        groups = {
            group.name: {"targets": list(group.targets), "weights": format_weights(group.fmt)}
            | ({"input_activations": format_inputs(group.fmt)} if self.scales_inputs(group.fmt) else {})
            for group in self.groups
        }
        quantization: dict[str, Any] = {"config_groups": groups, "ignore": list(self.ignore)}
        modifiers: dict[str, Any] = {}
        if "awq" in self.method:
            modifiers["AWQModifier"] = dict(self.extra.get("AWQModifier", {}))
        key = "GPTQModifier" if "gptq" in self.method else "QuantizationModifier"
        modifiers[key] = quantization | self.extra.get(key, {})
        block: dict[str, Any] = {"version": VERSION, "scale_search": self.scale_search, "container": container}
        if self.objective != "output":
            block["objective"] = self.objective
        if self.calibration is not None:
            block["calibration"] = self.calibration.as_plain()
        if "awq" in self.method:
            block["fold"] = self.fold
        if "gptq" in self.method:
            block["refine"] = self.refine
        if self.calibrated:
            block["signed_scales"] = self.signed_scales
        block["carve_outs"] = dict(sorted(self.carve_outs.items()))
        block |= self.output.as_plain()
        return {"default_stage": {"default_modifiers": modifiers}, "mimoquant": block}


def load_recipe(name_or_file: str) -> Recipe:
    """Read a shipped recipe by name, or a file.

    Raises RecipeError: not found, not YAML, or anything in it that this program does not know.
    """
    path = Path(name_or_file)
    if "/" not in name_or_file and path.suffix not in (".yaml", ".yml"):
        path = recipes_folder() / f"{name_or_file}.yaml"
        if not path.is_file():
            raise RecipeError(
                f"no recipe is named {name_or_file!r}",
                hint=f"shipped are {', '.join(shipped_recipes())}; a file is given by its path, ending in .yaml",
            )
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "there is no such recipe file"
        raise RecipeError(f"{path}: {'is a folder, not a recipe file' if path.is_dir() else problem}")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes, more than the {MAX_RECIPE_BYTES} a recipe may have")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
    return parse_recipe(text, path.stem)


def parse_recipe(text: str, name: str) -> Recipe:
    """Parse recipe YAML; see `load_recipe`."""
    return _Parser(name).parse(read_yaml(text, name))


class _Parser:
    """One recipe document to a `Recipe`; every method refuses what it does not know."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rounds: set[bool | None] = set()  # of each group, whether activations are rounded too; None: never

    def fail(self, problem: str, hint: str | None = None) -> NoReturn:
        raise RecipeError(f"recipe {self.name}: {problem}", hint=hint)

    def mapping(self, value: Any, what: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            self.fail(f"{what} must be a mapping, found {type(value).__name__}")
        return value

    def known(self, value: dict[Any, Any], keys: set[str], what: str) -> None:
        unknown = [key for key in value if key not in keys]
        if unknown:
            found = repr(value[unknown[0]])[:80]
            self.fail(f"unknown key {unknown[0]!r} in {what}, with {found}", f"known are {', '.join(sorted(keys))}")

    def strings(self, value: Any, what: str) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            self.fail(f"{what} must be a list of names or re: patterns")
        for item in items:
            try:
                check_pattern(item.removeprefix("re:")) if item.startswith("re:") else None
            except re.error as error:
                self.fail(f"{what} has the broken pattern {item!r} ({error})")
        return tuple(items)

    def parse(self, document: Any) -> Recipe:
        document = self.mapping(document, "the document")
        stages = [key for key in document if isinstance(key, str) and re.fullmatch(r".*_stage(_\d+)?", key)]
        self.known(without_empty(document), {*stages, "mimoquant"}, "the document")
        if len(stages) != 1:
            named = f" ({', '.join(stages)})" if stages else ""
            self.fail(f"needs exactly one stage (such as default_stage), found {len(stages)}{named}")
        modifiers = self.modifiers(self.mapping(document[stages[0]], stages[0]), stages[0])
        recipe = self.quantization(modifiers)
        return self.block(recipe, self.mapping(document.get("mimoquant") or {}, "mimoquant"))

    def modifiers(self, stage: dict[Any, Any], where: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for key, group in without_run_type(stage).items():
            if not (isinstance(key, str) and key.endswith("_modifiers")):
                self.fail(f"unknown key {key!r} in {where}", "expected default_modifiers")
            for modifier, settings in self.mapping(group, key).items():
                if modifier not in METHODS:
                    self.fail(f"{modifier} is not supported", f"supported are {', '.join(METHODS)}")
                if modifier in found:
                    self.fail(f"{modifier} appears twice", "use one modifier with several config_groups")
                found[modifier] = settings_of(modifier, self.mapping(settings or {}, modifier), self.fail)
        if {"GPTQModifier", "QuantizationModifier"} <= found.keys():
            self.fail("has both GPTQModifier and QuantizationModifier, which both choose the weights")
        if not found:
            self.fail("has no modifier")
        return found

    def quantization(self, modifiers: dict[str, dict[str, Any]]) -> Recipe:
        carriers = [key for key in modifiers if "scheme" in modifiers[key] or "config_groups" in modifiers[key]]
        if len(carriers) != 1:
            self.fail(
                f"needs exactly one modifier with a scheme or config_groups, found {len(carriers)}",
                "AWQModifier is followed by a QuantizationModifier that says the format",
            )
        carrier = modifiers[carriers[0]]
        groups, searches = self.groups(carrier, carriers[0])
        ignore = tuple(
            pattern for settings in modifiers.values() for pattern in self.strings(settings.get("ignore"), "ignore")
        )
        methods = [METHODS[key] for key in ("AWQModifier", "GPTQModifier") if key in modifiers]
        extra = {
            key: {k: v for k, v in settings.items() if k not in FORMAT_KEYS} for key, settings in modifiers.items()
        }
        check_settings(extra, self.fail)
        for key, defaults in MODIFIER_DEFAULTS.items():
            if key in extra:
                extra[key] = defaults | {k: v for k, v in extra[key].items() if k != "actorder"}
        return Recipe(
            name=self.name,
            method="+".join(methods) or "rtn",
            groups=groups,
            ignore=tuple(dict.fromkeys(ignore)),
            scale_search=searches.pop() if len(searches) == 1 else "absmax",
            extra={key: settings for key, settings in extra.items() if settings},
        )

    def groups(self, settings: dict[str, Any], where: str) -> tuple[tuple[Group, ...], set[str]]:
        """The groups, and the scale searches that their observers ask for."""
        scheme, config_groups = settings.get("scheme"), settings.get("config_groups")
        if (scheme is None) == (config_groups is None):
            self.fail(f"{where} needs a scheme or config_groups, not both")
        chosen = weight_observer(settings, where, self.fail)
        if scheme is not None:
            return self.presets(scheme, settings), self.searches(chosen, where)
        groups: list[Group] = []
        searches: set[str | None] = set()
        for name, group in self.mapping(config_groups, "config_groups").items():
            group = self.mapping(group, f"group {name}")
            self.known(group, _GROUP_KEYS, name)
            weights = self.mapping(group.get("weights"), f"{name}.weights")
            fmt = self.format(weights, name)
            self.rounds.add(rounds_inputs(group, fmt, name, self.fail))
            groups.append(Group(str(name), self.strings(group.get("targets"), "targets"), fmt))
            expected = f"{'' if fmt.name == 'int4' else f'{fmt.name}-'}pack-quantized"
            if group.get("format") not in (None, expected):
                self.fail(f"{name}.format is {group['format']!r}, {fmt.label} is stored as {expected}")
            observer = weights.get("observer") if chosen is None else chosen
            searches |= self.searches(observer, name) or {None}
        if not groups:
            self.fail("config_groups is empty")
        if len(searches) > 1:
            self.fail("its groups have different observers", "one scale_search goes for all: mimoquant.scale_search")
        return tuple(groups), {search for search in searches if search is not None}

    def presets(self, scheme: Any, settings: dict[str, Any]) -> tuple[Group, ...]:
        """A preset scheme by its name, for the modifier's targets; or several, each with its own."""
        if isinstance(scheme, dict):
            named = [(name, self.strings(targets, f"scheme {name}")) for name, targets in scheme.items()]
        else:
            named = [(scheme, self.strings(settings.get("targets"), "targets") or ("Linear",))]
        for name, targets in named:
            if not isinstance(name, str) or name not in PRESETS:
                self.fail(f"scheme {name!r} is not supported", f"supported are {', '.join(PRESETS)}")
            if not targets:
                self.fail(f"scheme {name} has no targets")
            self.rounds.add(PRESETS[name][1])
        if not named:
            self.fail("scheme is empty")
        return tuple(Group(f"group_{n}", targets, PRESETS[name][0]) for n, (name, targets) in enumerate(named))

    def searches(self, observer: Any, where: str) -> set[str]:
        """The scale search that an observer asks for; none where there is no observer."""
        if observer is None:
            return set()
        if not isinstance(observer, str) or observer not in _OBSERVERS:
            self.fail(
                f"{where} has the observer {observer!r}, which is not supported",
                f"supported are {', '.join(_OBSERVERS)}",
            )
        return {_OBSERVERS[observer]}

    def format(self, weights: dict[str, Any], where: str) -> Format:
        self.known(
            weights,
            {"num_bits", "type", "symmetric", "strategy", "group_size", "observer", *WEIGHT_DEFAULTS},
            f"{where}.weights",
        )
        return weight_format(weights, where, self.fail)

    def check_cast(self, recipe: Recipe) -> None:
        names = {group.fmt.name for group in recipe.groups}
        if recipe.method != "rtn" or len(names) > 1:
            self.fail("scale_search cast has one format and no calibration", "see nvfp4-cast and mxfp4-cast")
        if "int4" in names:
            self.fail("scale_search cast makes NVFP4 or MXFP4, int4 holds no value of theirs exactly")

    def rounding(self, block: dict[Any, Any]) -> tuple[str, int, bool]:
        """How AWQ folds its factors, rounds after GPTQ, and whether scales may be negative."""
        fold, refine, signed = block.get("fold", "pow2"), block.get("refine", 2), block.get("signed_scales", True)
        if fold not in _FOLDS:
            self.fail(f"fold {fold!r} is unknown", f"known are {', '.join(_FOLDS)}")
        if type(refine) is not int or not 0 <= refine <= 100:
            self.fail(f"refine is {refine!r}, expected a number of rounds")
        if not isinstance(signed, bool):
            self.fail(f"signed_scales is {signed!r}, expected true or false")
        return fold, refine, signed

    def block(self, recipe: Recipe, block: dict[Any, Any]) -> Recipe:
        """Apply the `mimoquant:` block."""
        self.known(block, _BLOCK_KEYS, "mimoquant")
        if block.get("version", VERSION) != VERSION:
            self.fail(f"mimoquant.version is {block['version']!r}; this program reads {VERSION}")
        default = "gram" if recipe.method != "rtn" and recipe.scale_search == "absmax" else recipe.scale_search
        search = block.get("scale_search", default)
        if search not in (*SEARCHES, "gram", "cast"):
            self.fail(f"scale_search {search!r} is unknown", f"known are {', '.join(SEARCHES)}, gram, cast")
        if search == "cast":
            self.check_cast(recipe)
        container = block.get("container")
        if container not in (None, *CONTAINERS):
            self.fail(f"container {container!r} is unknown", f"known are {', '.join(CONTAINERS)}")
        carve_outs = self.mapping(block.get("carve_outs") or {}, "mimoquant.carve_outs")
        for layer, kind in carve_outs.items():
            if type(layer) is not int or layer < 0 or kind not in CARVE_OUTS:
                self.fail(f"carve_outs has {layer!r}: {kind!r}; expected a layer number and bf16, fp8 or source")
        fold, refine, signed = self.rounding(block)
        held = parse_calibration(block.get("calibration"), block.get("objective", "output"), self.fail)
        recipe = replace(
            recipe,
            scale_search=search,
            container=container,
            carve_outs=dict(carve_outs),
            fold=fold,
            refine=refine,
            signed_scales=signed,
            provenance=self.mapping(block.get("provenance") or {}, "provenance"),
        )
        unused = {
            "calibration": not recipe.calibrated,
            "signed_scales": not recipe.calibrated,
            "fold": "awq" not in recipe.method,
            "refine": "gptq" not in recipe.method,
            "objective": "gptq" not in recipe.method,
        }
        for key in unused:
            if unused[key] and block.get(key) is not None:
                self.fail(f"mimoquant.{key} has no meaning for the method {recipe.method} by {recipe.scale_search}")
        output = parse_output_settings(block, self.fail, self.rounds, calibrated=recipe.calibrated)
        return replace(recipe, output=output, calibration=(held or Calibration()) if recipe.calibrated else None)
