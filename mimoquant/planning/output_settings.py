"""What a recipe says of its output beside how experts are quantized: how the rest is stored, what it is called.

Key idea: these stand in the `mimoquant:` block, written out only where they are not the default, so that recipes and
outputs which do without them are what they were. As in `recipe`, what is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from typing import Any

from mimoquant.model.releases import check_repository, is_repository, is_revision
from mimoquant.planning.calibration_settings import Fail
from mimoquant.weights.container import CALIBRATED, DENSE, INPUT_SCALES, NONE, UNIT


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """`dense`: FP8 beside the experts, in ModelOpt's container. `input_scales`: of NVFP4 experts' activations.
    `base_model`: the source's repository on the Hub, where its user says it. `mend_json`: whether JSON files beside the
    shards are mended where no parser takes them. `source_revision`: ORG/NAME@COMMIT, where the source was read from the
    Hub."""

    dense: str = DENSE[0]
    input_scales: str = INPUT_SCALES[0]
    base_model: str | None = None
    mend_json: bool = False
    source_revision: str | None = None

    @property
    def named_base(self) -> str | None:
        """The repository that the user names, as such or as the source."""
        return self.base_model or (self.source_revision.partition("@")[0] if self.source_revision else None)

    def as_plain(self) -> dict[str, Any]:
        """What is not the default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in values.items() if value != _DEFAULTS[key]}


_DEFAULTS = {field.name: field.default for field in fields(OutputSettings)}
OUTPUT_KEYS = set(_DEFAULTS)


def check_chosen(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings from the command line. Raises UsageError where `base_model` is no repository's name."""
    if changes.get("base_model") is not None:
        check_repository(changes["base_model"])
    return changes


def parse_output_settings(
    block: Mapping[Any, Any], fail: Fail, rounds: Set[bool | None], *, calibrated: bool
) -> OutputSettings:
    """Of a recipe's `mimoquant:` block; `fail` raises RecipeError.

    Args:
        rounds: whether the recipe's groups of NVFP4 have input_activations. Where they have, and the block is silent,
            the scales are calibrated if the recipe is.
    """
    held = {key: value for key, value in block.items() if key in OUTPUT_KEYS and value is not None}
    for key, known in (("dense", DENSE), ("input_scales", INPUT_SCALES)):
        if held.get(key, known[0]) not in known:
            fail(f"{key} {held[key]!r} is unknown", f"known are {', '.join(known)}")
    base = held.get("base_model")
    if base is not None and not (isinstance(base, str) and is_repository(base)):
        fail(f"base_model is {base!r}, expected owner/model as the Hub has it")
    read = held.get("source_revision")
    if read is not None and not (isinstance(read, str) and is_revision(read)):
        fail(f"source_revision is {read!r}, expected owner/model@commit")
    if not isinstance(held.get("mend_json", False), bool):
        fail(f"mend_json is {held['mend_json']!r}, expected true or false")
    if True in rounds:
        if False in rounds:
            fail("some groups of NVFP4 have input_activations and others have none", "give them to all or to none")
        if held.setdefault("input_scales", CALIBRATED if calibrated else UNIT) == NONE:
            fail("input_scales is none, and its groups have input_activations", "leave one of them out")
    return OutputSettings(**held)
