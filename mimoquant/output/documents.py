"""What `quantize` and `verify` say, field by field: what `--json` prints and the Python functions return.

Key idea: `QuantizeReport` is OUT/report.json, which depends on neither machine nor clock; the document of the verb adds
where and how long. Sizes are in bytes; a layer is named by its number among the decoder layers, from 0.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from mimoquant.calibration.layer_facts import LayerRecord
from mimoquant.planning.documents import EngineCheck, WrittenShard
from mimoquant.wording import ClampedGroups


class QuantizeReport(TypedDict):
    """OUT/report.json: what a run wrote."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    container: str
    """How the experts are stored: compressed-tensors, native or modelopt."""
    method: str
    """How codes were chosen: rtn, gptq, awq, or awq and gptq."""
    scale_search: str
    """How scales were chosen: absmax, mse, gram, or cast."""
    formats: dict[str, list[int]]
    """Format → the MoE layers that have it."""
    carve_outs: dict[str, str]
    """MoE layer that was kept → what it stayed: bf16 or fp8."""
    source_bytes: int
    """The source's shards."""
    output_bytes: int
    """The output's shards."""
    fallbacks: dict[str, int]
    """What a calibrated run did instead of its method → how often; empty without calibration."""
    notes: list[str]
    """What a user should know of the result."""
    clamped_groups: NotRequired[dict[str, ClampedGroups]]
    """Weight → its groups that have no scale in the format though they are not zero; of the weights that have such
    groups, and absent where none has."""
    source_revision: NotRequired[str]
    """ORG/NAME@COMMIT; only where the source was read from the Hub."""
    shards: list[WrittenShard]
    """In the order of writing."""
    calibration: dict[str, LayerRecord] | None
    """Layer ("layer 3") → what calibration reached there; null without calibration."""


class Bound(TypedDict):
    """What a run waited for most."""

    what: str
    """reading, computing or writing."""
    share: float
    """Of the run's time, 0 to 1."""


class QuantizeDocument(QuantizeReport):
    """The report, and what depends on where it was made."""

    out: str
    """The folder that was written."""
    found_finished: bool
    """Whether the folder was finished before, by the same request, so that nothing was written."""
    elapsed_s: float
    """Seconds from the beginning of the verb to its end."""
    bound_by: Bound
    """What the run waited for most."""
    engines: list[EngineCheck]
    """vLLM and SGLang, as far as it does not depend on how they are started."""


class VerifyDocument(TypedDict):
    """A checkpoint held against its source, an engine, or both. What is about the source is absent without --source."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    out: str
    """The checkpoint that was checked."""
    ok: bool
    """Whether nothing is wrong with its files, also as libraries read them; what an engine says is in `engine`."""
    problems: list[str]
    """What is wrong with its files, each in a sentence."""
    checked: NotRequired[dict[str, int]]
    """What ("files", "tensors", "quantized tensors", ...) → how many of them were checked; absent without --source."""
    bytes_checked: NotRequired[int]
    """Bytes of the output that were read and compared; absent without --source."""
    worst_rounding: NotRequired[float]
    """The largest distance of a value from its code, in half grid steps: at most 1 for nearest rounding; 0 where codes
    need not be the nearest (calibrated) or none were checked; absent without --source."""
    worst_rounding_tensor: NotRequired[str | None]
    """Where that is; null where it is 0; absent without --source."""
    worst_relative_error: NotRequired[float]
    """The largest relMSE of a quantized tensor, squared error over squared values, where it is finite; absent without
    --source."""
    worst_relative_error_tensor: NotRequired[str | None]
    """Where that is; null where no quantized tensor was checked; absent without --source."""
    mean_relative_error: NotRequired[float]
    """relMSE over all quantized tensors together whose own is finite; absent without --source."""
    unproven: NotRequired[list[str]]
    """What the recipe asks for and files alone cannot prove, each in a sentence; absent without --source."""
    set_aside: NotRequired[list[str]]
    """Files that are no part of the proof, each with why: edited or added where the checkpoint was published (model
    card, pictures, licence, chat template), or left there by tools; absent without --source."""
    clamped_groups: NotRequired[dict[str, ClampedGroups]]
    """Weight → its groups that have no scale in the format though they are not zero, counted here; absent where there
    are none, and without --source."""
    engine: NotRequired[EngineCheck]
    """What the engine accepts; absent without --engine, and where files are not what the source makes them."""
