"""What inspect, plan, quantize, relayout, verify, launch and synth print."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mimoquant.report.coverage_text import coverage_text
from mimoquant.serving import contracts as c
from mimoquant.wording import clamped_notes, duration, layers_of_formats, ranges, size, table

if TYPE_CHECKING:
    from mimoquant.output.documents import QuantizeDocument, VerifyDocument
    from mimoquant.planning.documents import (
        CarriedDrafter,
        EngineCheck,
        InspectDocument,
        PlanDocument,
        RelayoutDocument,
    )
    from mimoquant.serving.documents import LaunchDocument
    from mimoquant.synthetic.documents import SynthDocument


def drafter_text(facts: CarriedDrafter) -> str:
    """In one line."""
    if facts["problem"]:
        return f"cannot be used ({facts['problem']})"
    layers, window = ranges(facts["captured_layers"]), facts["window"] or "none"
    return (
        f"DFlash, {facts['layers']} layers, blocks of {facts['block_size']}, window {window}, reads states after "
        f"layers {layers}"
    )


def layout_text(facts: InspectDocument) -> str:
    release = f" ({facts['release']})" if facts["release"] else ""
    lines = [
        f"{facts['model_type']}{release}, {facts['weights']}, {size(facts['size_bytes'])} "
        f"in {facts['tensors']} tensors, {facts['files']} files",
        f"layers    {facts['layers']}, of which {len(facts['moe_layers'])} with {facts['experts']} routed experts "
        f"(top {facts['top_k']}, width {facts['hidden']} x {facts['expert_intermediate']})",
        f"attention qkv {facts['qkv']}; global in layers {ranges(facts['global_layers'])}, sliding window elsewhere",
        f"MTP       {facts['mtp_layers'] or 'no'} layers",
        *([f"on the Hub {' or '.join(facts['repositories'])}"] if facts["repositories"] else []),
        *([f"drafter   {drafter_text(facts['drafter'])}"] if facts["drafter"] else []),
        "",
        *table(
            ("weights", "dtype", "size"),
            [
                (role, dtype, size(count))
                for role, sizes in facts["bytes_by_role"].items()
                for dtype, count in sorted(sizes.items())
            ],
        ),
    ]
    if facts["layers_with_an_expert_in_two_files"]:
        lines += [
            "",
            f"note: experts of layer {', '.join(facts['layers_with_an_expert_in_two_files'])} lie in two files",
        ]
    parted = facts["weights_parted_from_their_scale"]
    if parted:
        lines += [f"note: {len(parted)} weights lie in another file than their scale, first {parted[0]}"]
    if facts["unknown_tensors"]:
        lines += [f"note: {len(facts['unknown_tensors'])} unknown tensors, first {facts['unknown_tensors'][0]}"]
    lines += [f"note: {note}" for note in facts["notes"]]
    return "\n".join(lines)


def plan_text(facts: PlanDocument) -> str:
    formats = "; ".join(f"{label} in layers {ranges(layers)}" for label, layers in facts["formats"].items())
    kept = ", ".join(f"layer {layer} stays {kind}" for layer, kind in facts["carve_outs"].items()) or "none"
    before, after = facts["source_bytes"], facts["output_bytes"]
    largest = max(facts["shards"], key=lambda shard: shard["size_bytes"])
    return "\n".join(
        [
            *([f"release    {facts['release']}"] if facts["release"] else []),
            f"recipe     {facts['recipe']}: {facts['method']}, scales by {facts['scale_search']}",
            f"experts    {formats}",
            f"carve-outs {kept}",
            f"container  {facts['container']}",
            f"size       {size(before)} -> {size(after)} ({after / before:.1%}), {after} bytes in "
            f"{len(facts['shards'])} shards, the largest {size(largest['size_bytes'])} ({largest['unit']})",
            *_demands(facts),
            f"beside     {len(facts['side_files'])} other files are copied, {size(facts['side_bytes'])}",
            *([f"drafter    {drafter_text(facts['drafter'])}"] if facts["drafter"] else []),
            "",
            *table(
                ("weights", "output"),
                [(role, size(count)) for role, count in facts["output_bytes_by_role"].items()],
            ),
            *(["", *(f"note: {note}" for note in facts["notes"])] if facts["notes"] else []),
            *planned_lines(facts["engines"]),
        ]
    )


def _demands(facts: PlanDocument) -> list[str]:
    """Lines on memory and time, and on those of `sensitivity`."""
    has, took = facts["machine"], facts["estimate"]
    lines = [
        f"memory     at most about {size(facts['host_memory_bytes'])} of host memory "
        f"(here {size(has['host_bytes'])}, free {size(has['host_free_bytes'])})"
    ]
    if facts["gpu_memory_bytes"]:
        lines.append(
            f"GPU        at most about {size(facts['gpu_memory_bytes'])} of its memory (here "
            f"{size(has['gpu_bytes'])}), {facts['experts_at_once']} experts at once"
        )
    if back := facts["walk_back"]:
        gpu = f" and {size(back['gpu_memory_bytes'])} of the GPU's" if back["gpu_memory_bytes"] else ""
        spent = f", about {duration(back['computing_s'])}" if "computing_s" in back else ""
        lines.append(
            f"walk back  {back['tokens']} tokens x {back['draws']} draws first{spent}: at most about "
            f"{size(back['host_memory_bytes'])} of host memory{gpu}; hidden states {size(back['states_bytes'])} "
            f"{'in files' if back['states'] == 'files' else 'on the host'}, files {size(back['file_bytes'])}, of which "
            f"{size(back['left_bytes'])} stay until the last layer"
        )
    if facts["disk_free_bytes"] is not None:
        lines.append(
            f"disk       {size(facts['output_bytes'] + facts['side_bytes'])}, free are {size(facts['disk_free_bytes'])}"
        )
    if took:
        lines.append(
            f"time       about {duration(took['total_s'])}, bound by {took['bound_by']}: computing "
            f"{duration(took['computing_s'])}, reading {duration(took['reading_s'])} at "
            f"{size(int(took['read_bytes_per_s']))}/s, writing {duration(took['writing_s'])} at "
            f"{size(int(took['write_bytes_per_s']))}/s, starting {duration(took['starting_s'])}"
        )
    if forks := facts["sensitivity"]:
        gpu = f" and {size(forks['gpu_memory_bytes'])} of a GPU's" if forks["gpu_memory_bytes"] else ""
        lines.append(
            f"forks      sensitivity would take {forks['forward_passes']:.1f} forward passes of "
            f"{forks['tokens']} tokens, at most about {size(forks['host_memory_bytes'])} of host memory{gpu}, "
            f"{size(forks['resume_bytes'])} to resume from"
        )
    return lines


def quantize_text(facts: QuantizeDocument) -> str:
    before, after, seconds = facts["source_bytes"], facts["output_bytes"], facts["elapsed_s"]
    formats = layers_of_formats(facts["formats"])
    return "\n".join(
        [
            f"{_made(facts)}: {len(facts['shards'])} shards, {size(after)} ({after / before:.1%} of source)",
            f"experts    {formats} ({facts['method']}, scales by {facts['scale_search']}), {facts['container']}",
            *([f"coverage   {coverage_text(facts['calibration'])}"] if facts["calibration"] else []),
            *(f"clamped    {note}" for note in clamped_notes(facts.get("clamped_groups", {}))),
            _time(
                facts,
                f"{size(int(before / max(seconds, 1e-3)))}/s of source; bound by "
                f"{facts['bound_by']['what']} ({facts['bound_by']['share']:.0%})",
            ),
            *planned_lines(facts["engines"]),
        ]
    )


def _made(facts: QuantizeDocument | RelayoutDocument) -> str:
    """Whether a run wrote its folder, or found it finished."""
    return (
        f"finished   {facts['out']}, nothing was written" if facts["found_finished"] else f"wrote      {facts['out']}"
    )


def _time(facts: QuantizeDocument | RelayoutDocument, pace: str) -> str:
    """`pace`: of a run that wrote something."""
    return f"time       {facts['elapsed_s']:.1f} s, {'to read what is there' if facts['found_finished'] else pace}"


def relayout_text(facts: RelayoutDocument) -> str:
    qkv, dtypes, after = facts["qkv"], facts["dtypes"], facts["output_bytes"]
    return "\n".join(
        [
            f"{_made(facts)}: {len(facts['shards'])} shards, {size(after)} "
            f"({after / facts['source_bytes']:.1%} of source)",
            f"qkv        {qkv['before']}, {dtypes['before']} -> {qkv['after']}, {dtypes['after']} "
            f"in {facts['layers']} layers",
            _time(facts, f"{size(int(after / max(facts['elapsed_s'], 1e-3)))}/s"),
            *planned_lines(facts["engines"]),
        ]
    )


def verify_text(facts: VerifyDocument, limit: int = 20) -> str:
    lines = _proof_lines(facts, limit) if "checked" in facts else _problem_lines(facts["problems"], limit)
    return "\n".join([*lines, *(engine_lines(facts["engine"]) if "engine" in facts else [])])


def _proof_lines(facts: VerifyDocument, limit: int) -> list[str]:
    """What `verify --source` found."""
    counts = [f"{count} {what}" for what, count in facts["checked"].items()]
    by_libraries = ", ".join(text for text in counts if " by " in text)
    checked = ", ".join(text for text in counts if " by " not in text)
    return [
        f"{'ok' if facts['ok'] else 'FAILED'}         {facts['out']}",
        f"checked    {checked}; {size(facts['bytes_checked'])} read",
        *([f"libraries  {by_libraries}"] if by_libraries else []),
        *(
            [f"rounding   worst {facts['worst_rounding']:.4f} half steps ({facts['worst_rounding_tensor']})"]
            if facts["worst_rounding_tensor"]
            else []
        ),
        *(
            [
                f"error      relMSE {facts['mean_relative_error']:.3e} over all experts, worst "
                f"{facts['worst_relative_error']:.3e} ({facts['worst_relative_error_tensor'] or 'none'})"
            ]
            if facts["checked"].get("quantized tensors")
            else []
        ),
        *(f"clamped    {note}" for note in clamped_notes(facts.get("clamped_groups", {}))),
        *(f"unproven   {text}" for text in facts["unproven"]),
        *(f"beside     {text}" for text in facts["set_aside"]),
        *_problem_lines(facts["problems"], limit),
    ]


def _problem_lines(problems: list[str], limit: int) -> list[str]:
    lines = [f"problem    {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"problem    ... and {len(problems) - limit} more (--json lists all)")
    return lines


def synth_text(facts: SynthDocument) -> str:
    counts = f"{facts['tensors']} tensors, {facts['files']} files, {size(facts['size_bytes'])}"
    return f"wrote {facts['out']}: {facts['layout']}, {counts}"


def engine_lines(facts: EngineCheck) -> list[str]:
    """`engine_facts` as text."""
    at = f" at TP {facts['tp']}" if facts["tp"] else ""
    head = f"{c.ENGINES[facts['engine']].label} {facts['version']}{at}"
    if not facts["problems"]:
        return [f"{head}: nothing is known against it"]
    lines = []
    for problem in facts["problems"]:
        lines.append(f"{head}: {problem['verdict']}: {problem['text']} [{problem['source']}]")
        if problem["hint"]:
            lines.append(f"  hint: {problem['hint']}")
    return lines


def planned_lines(engines: list[EngineCheck]) -> list[str]:
    """`planned_facts` as text, short: sources and hints are in `verify --engine`."""
    return [
        f"{c.ENGINES[facts['engine']].label}: {problem['verdict']}: {problem['text']}"
        for facts in engines
        for problem in facts["problems"]
    ]


def launch_text(facts: LaunchDocument) -> str:
    """`LaunchDocument` as text; the command is on lines of its own, to be copied."""
    layout = facts["layout"]
    shared = f"attention TP {layout['attention_tp']}, data parallel {layout['dp']}, experts " + (
        "whole on their GPU" if layout["ep"] else f"cut in {layout['gpus']}"
    )
    engine = f"{c.ENGINES[facts['engine']].label} {facts['version']}"
    lines = [
        f"{engine} on {layout['gpus']} x {facts['gpu']}: {shared}",
        f"format     {facts['evidence']}",
        f"image      {facts['image']} (tag not verified); least version {facts['minimum_version']}",
        f"memory     {size(facts['weights_bytes'])} of weights and {facts['kv_bytes_per_token']} bytes of KV cache a "
        f"token on each GPU: {facts['context']} tokens of context",
        f"back ends  attention {facts['attention_backend']}, MoE {facts['moe_backend'] or 'chosen by the engine'}",
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in facts["environment"].items()),
        *_command_lines(facts["command"]),
        "",
        *(f"expect     {line}" for line in facts["expect"]),
        *(f"note: {note}" for note in facts["notes"]),
    ]
    for patch in facts["patches"]:
        since = f"not needed from vLLM {patch['not_needed_from']} on" if patch["not_needed_from"] else "version unknown"
        lines.append(f"patch once needed: {patch['what']}; {since} [{patch['source']}]")
    return "\n".join(lines)


def _command_lines(command: list[str]) -> list[str]:
    """One option a line, its value beside it."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(word if word.startswith("<") else shlex.quote(word))
    joined = [" ".join(words) for words in lines]
    return [("  " if i else "") + text + (" \\" if i < len(joined) - 1 else "") for i, text in enumerate(joined)]
