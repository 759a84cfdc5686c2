"""OUT/README.md, a model card that can be published as it is: what was changed, how good it is, how it is served.

Key idea: all of it follows from the plan and the report, so `verify` writes it again and compares, but for the section
on quality: that is what `eval-kl --card` measured, between two marks.
Left out: the Hub's evaluation metadata, which has no task that J would be a metric of.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mimoquant.__version__ import __version__
from mimoquant.checkpoint.remote import revision_of
from mimoquant.checkpoint.writer import write_file_durably
from mimoquant.errors import MimoquantError, UsageError
from mimoquant.output.documents import QuantizeReport
from mimoquant.serving.check import engine_facts
from mimoquant.serving.contracts import ENGINES, SGLANG, VLLM
from mimoquant.serving.launch import launch
from mimoquant.serving.served import Served
from mimoquant.weights.container import NATIVE
from mimoquant.wording import interval, layers_of_formats, left_out_note, media_note, number, rounding_note, size

if TYPE_CHECKING:
    from mimoquant.evaluation.documents import Evaluation
    from mimoquant.evaluation.rounding_documents import RoundingFacts

BEGIN, END = "<!-- eval-kl begins -->", "<!-- eval-kl ends -->"
_UNMEASURED = "Not measured yet: `mimoquant eval-kl SOURCE THIS --card` writes symmetric KL here."
_TEXT_ONLY = "- Text was what quality is measured on; images, audio and long contexts were not looked at."
_MEDIA_TOO = "- Quality is measured on the contexts that the table names; long ones were not looked at."
_GPUS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Origin:
    """What was quantized: which published model it is, and its repository on the Hub; None where that is unknown."""

    release: str | None
    base_model: str | None
    revision: str | None = None  # ORG/NAME@COMMIT that was read

    @property
    def title(self) -> str:
        return (self.base_model or self.release or "MiMo-V2 checkpoint").rpartition("/")[2]


def model_card(report: QuantizeReport, served: Served, origin: Origin, *, real_fold: bool) -> str:
    """The card, its quality not measured yet. `real_fold`: norms and routers were scaled by real factors."""
    served = replace(served, name=".")
    folded = "their norms and routers are scaled against each other by real factors, and " if real_fold else ""
    formats = layers_of_formats(report["formats"])
    kept = ", ".join(f"layer {layer} in {kind}" for layer, kind in report["carve_outs"].items()) or "none"
    shown = media_note((report["calibration"] or {}).values())
    lines = [
        *_front_matter(origin.base_model, report, served),
        "",
        f"# {origin.title}, routed experts in 4 bits",
        "",
        f"Written by mimoquant {__version__}. Only the routed experts were quantized; {folded}the value of "
        "every other weight is the source's.",
        "",
        f"- experts: {formats} ({report['method']}, scales by {report['scale_search']}), "
        f"container {report['container']}",
        f"- layers whose experts were kept: {kept}",
        f"- size: {size(report['output_bytes'])} (source {size(report['source_bytes'])})",
        *([f"- read from the Hub: {origin.revision}"] if origin.revision else []),
        *([f"- calibrated on images or sounds too: {shown}"] if shown else []),
        *(f"- {note}" for note in report["notes"]),
        "",
        "`recipe.yaml` repeats this run byte for byte; `mimoquant verify THIS --source SOURCE` proves the files.",
        "",
        "## Quality",
        "",
        BEGIN,
        _UNMEASURED,
        END,
        "",
        "## Serving",
        "",
        *_serving(served),
        "## Limits",
        "",
        _rounding_limit(served),
        _TEXT_ONLY,
        "- Licence and limits of use are the base model's.",
    ]
    return "\n".join(lines)


def _rounding_limit(served: Served) -> str:
    if not served.input_scales:
        return (
            "- Only weights were quantized. Some back ends round activations, by their own choice: J of weights does "
            "not know of it."
        )
    return (
        "- Experts' activations are declared in 4 bits, with input scales: kernels on Blackwell round them, which J of "
        "weights does not know of (`eval-kl --as-served` does); others compute weights alone."
    )


def _front_matter(base_model: str | None, report: QuantizeReport, served: Served) -> Iterator[str]:
    yield from ("---", "license: mit")
    if base_model:
        yield from (f"base_model: {base_model}", "base_model_relation: quantized")
    if engine_facts(served, "transformers", None, None)["ok"]:  # the Hub shows how to load it with the library named
        yield "library_name: transformers"
    yield from ("pipeline_tag: text-generation", "tags:", "- mimoquant")
    if report["container"] != NATIVE:
        yield f"- {report['container']}"
    yield from dict.fromkeys(f"- {label.split()[0]}" for label in report["formats"])  # a mixture may have int4 twice
    yield "---"


def _serving(served: Served) -> Iterator[str]:
    """For either server the command on the fewest H100s that will do, or why there is none."""
    for engine in (VLLM, SGLANG):
        label = ENGINES[engine].label
        reason: MimoquantError | None = None
        for gpus in _GPUS:
            try:
                made = launch(served, engine, "h100", gpus)
            except UsageError as error:  # too few GPUs
                reason = error
                continue
            except MimoquantError as error:  # other GPUs would not help, other numbers of them may
                reason = error
                continue
            exports = [f"export {name}={shlex.quote(value)}" for name, value in made["environment"].items()]
            yield from (f"{label} from {made['minimum_version']} on, {gpus} x {made['gpu']}, in this folder:", "")
            yield from ("```bash", *exports, shlex.join(made["command"]), "```", "")
            break
        else:
            yield from (f"{label}: {reason}".replace(".: ", ""), "")
    yield "These commands follow from what the servers' sources say, and were not run with this checkpoint. Other GPUs"
    yield from ("and numbers of them: `mimoquant launch THIS --engine vllm --gpu KIND --gpus N`.", "")


def read_card(folder: Path) -> str:
    """The card of an output, that can be written to. Raises UsageError where there is none."""
    if revision_of(folder):
        raise UsageError(
            f"--card: {folder}/README.md is on the Hub, which is only read", hint="give a folder of this machine"
        )
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--card: {folder}/README.md cannot be read ({error})", hint="only quantize writes one"
        ) from error


def write_quality(folder: Path, measured: Evaluation) -> None:
    """Put what `eval-kl` measured into the card of an output. Raises UsageError where it has no place for that."""
    before, after = quality_place(read_card(folder))
    after = after.replace(_MEDIA_TOO, _TEXT_ONLY)
    if "by_context" in measured:
        after = after.replace(_TEXT_ONLY, _MEDIA_TOO)
    write_file_durably(
        folder / "README.md", (before + "\n".join(_quality(measured)) + after).encode(errors="backslashreplace")
    )


def without_quality(card: str) -> str:
    """The card as `quantize` wrote it."""
    try:
        before, after = quality_place(card)
    except UsageError:
        return card
    return before + _UNMEASURED + after.replace(_MEDIA_TOO, _TEXT_ONLY)


def quality_place(card: str) -> tuple[str, str]:
    """What stands before and after the section on quality."""
    before, begin, rest = card.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"\n{END}")
    if not (begin and end):
        raise UsageError("--card: the candidate's README.md has no section on quality", hint="only quantize writes one")
    return before + begin, end + after


def _quality(measured: Evaluation) -> Iterator[str]:
    j, top1, data, floor = measured["j"], measured["top1"], measured["data"], measured["noise_floor"]
    sequences, length = measured["sequences"], measured["sequence_tokens"]
    stored = measured["reference_stored"]
    what = "the bf16 reference" if stored == "bf16" else f"the reference ({stored})"
    yield f"Against {what} on {measured['tokens']} held-out tokens ({data['name']}, {sequences} "
    yield f"sequences of up to {length}), over the full vocabulary, in nats per token:"
    yield from ("", "| | |", "|---|---|")
    yield f"| symmetric KL, J | {number(j['mean'])} (95 % {interval(j, sequences=sequences)}) |"
    yield from (f"| what J leaves out | {note} |" for note in left_out_note(measured["left_out"]))
    if rounding := cast("RoundingFacts | None", measured.get("rounding")):
        kinds = rounding["experts"], rounding["dense"], rounding["kv_cache"], rounding["input_scales"]
        yield f"| rounded beside weights | {rounding_note(*kinds, rounding.get('stored', 'float32'))} |"
        names = {"weights": "J of weights alone", "activations": "J of activations alone", "both": "J of both"}
        of = f", {rounding['sequences']} sequences"
        yield from (f"| {names[part['cause']]}{of} | {number(part['j'])} |" for part in rounding["causes"])
    yield f"| J at the median, p99 | {number(j['median'])}, {number(j['p99'])} |"
    if floor:
        noise = max(floor["batch"], floor["relative_noise"])
        yield f"| J of the reference against itself, with bf16 noise | {number(noise)} |"
    yield f"| the same most likely token | {100 * top1['all']:.2f} % |"
    yield f"| perplexity ratio | {number(measured['perplexity']['ratio'], 5)} |"
    yield from (f"| J, {d['domain']} | {number(d['j'])} |" for d in measured["by_domain"])
    yield from (f"| J, {c['context']} | {number(c['j'])} |" for c in measured.get("by_context", []))
