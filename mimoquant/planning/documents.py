"""What `inspect`, `plan` and `relayout` say, field by field: what `--json` prints and the Python functions return.

Key idea: a document is a plain dict that JSON can hold, and this is its type. Sizes are in bytes; a layer is named by
its number among the decoder layers, from 0; dtypes have safetensors' names (BF16, F8_E4M3, F32, U8, I32).
Left out: text and pages, which are made from these documents (`report`).
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class AttentionSizes(TypedDict):
    """Of one kind of attention."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values."""
    head_dim: int
    """Channels of a query or key head."""
    v_head_dim: int
    """Channels of a value head."""


class CarriedDrafter(TypedDict):
    """The DFlash drafter in a checkpoint's folder."""

    problem: str | None
    """Why it cannot be used, in words; null where it can."""
    layers: NotRequired[int]
    """Decoder layers of the drafter. This and what follows is absent where its config cannot be read."""
    block_size: NotRequired[int]
    """Tokens of a block: the last one that is known, and those that are drafted at once."""
    window: NotRequired[int | None]
    """Tokens that its attention sees; null: all."""
    captured_layers: NotRequired[list[int]]
    """Layers of the backbone whose hidden states it reads."""


class InspectDocument(TypedDict):
    """What `inspect` finds in a checkpoint's headers and config.json."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    checkpoint: str
    """The folder."""
    model_type: str
    """As config.json has it: mimo_v2_flash or mimo_v2."""
    release: str | None
    """The published model that it is or was converted from, told by sizes, settings and towers; null for any other."""
    repositories: list[str]
    """Of that release on the Hub: the files can be of any of these. None where they are not as published."""
    files: int
    """Shards."""
    tensors: int
    """Tensors, scales among them."""
    size_bytes: int
    """Of all shards, headers included."""
    weights: str
    """What most of it is stored in: bf16, fp8 128x128, or 4-bit experts."""
    layers: int
    """Decoder layers."""
    global_layers: list[int]
    """Layers whose attention sees the whole context; the others have a sliding window."""
    moe_layers: list[int]
    """Layers with routed experts."""
    hidden: int
    """Width of the model, in channels."""
    experts: int
    """Routed experts of a MoE layer."""
    top_k: int
    """Experts that the router sends a token to."""
    expert_intermediate: int
    """Width inside an expert, in channels."""
    attention: dict[str, AttentionSizes]
    """Kind of attention (global: it sees the whole context; sliding: a window) → its sizes."""
    qkv: str
    """How q, k and v lie on disk: split, fused [Q|K|V], or fused in interleaved ranks."""
    mtp_layers: int
    """Layers for multi-token prediction; 0: none."""
    drafter: CarriedDrafter | None
    """The drafter in the folder; null without one."""
    bytes_by_role: dict[str, dict[str, int]]
    """Kind of weight → dtype → bytes; a scale counts with its weight's kind."""
    layers_with_an_expert_in_two_files: list[str]
    """Layers, as text, with an expert whose projections lie in two files."""
    weights_parted_from_their_scale: list[str]
    """Experts' weights that lie in another file than their scale."""
    unknown_tensors: list[str]
    """Tensors without a known role, which only --allow-unknown lets pass."""
    notes: list[str]
    """Where config.json and files differ, and what is rounded beside weights."""


# --- plan -------------------------------------------------------------------------------------------------------------


class MachineMemory(TypedDict):
    """What this machine has, as far as the process may use it."""

    host_bytes: int
    """Host memory, of the machine or its control group, divided among the processes that torchrun started."""
    host_free_bytes: int
    """How much of that is free at the moment."""
    gpu_bytes: int
    """Usable memory of the GPU; 0 where none computes."""


class RunEstimate(TypedDict):
    """How long a run will take once kernels are compiled. Reading, computing and
    writing overlap."""

    reading_s: float
    """Seconds that reading the source takes."""
    computing_s: float
    """Seconds that computing takes."""
    writing_s: float
    """Seconds that hashing and writing the output take."""
    read_bytes_per_s: float
    """Measured, past the page cache."""
    write_bytes_per_s: float
    """Measured; of hashing alone where no --out was given."""
    bound_by: str
    """The longest of the three: reading, computing or writing."""
    starting_s: float
    """Seconds before anything is quantized: libraries, the device, the tokens' way to the first layer."""
    total_s: float
    """Seconds of starting and of the longest of the three, which are the run's."""


class WalkBackNeeds(TypedDict):
    """What the walk takes that comes before anything is quantized, where codes are chosen for the loss."""

    tokens: int
    """Tokens that are walked forward and back."""
    draws: int
    """Labels drawn at each of them."""
    states: str
    """Where their hidden states rest, by what is free here: host or files."""
    states_bytes: int
    """Hidden states, of all processes, on hosts or in files."""
    file_bytes: int
    """Files beside the output at the peak, in OUT.partial; hidden states among them where they rest there."""
    left_bytes: int
    """Files that stay until the last layer is written."""
    host_memory_bytes: int
    """Host memory at the peak, at most."""
    gpu_memory_bytes: int
    """GPU memory at the peak, at most; 0 where none computes."""
    computing_s: NotRequired[float]
    """Seconds, reckoned from the rehearsal; absent without --measure."""


class ForkNeeds(TypedDict):
    """What `sensitivity` would need for the same recipe, on as many tokens as it takes by itself."""

    forward_passes: float
    """Passes of all tokens through the model, that the forks take together."""
    tokens: int
    """Tokens that J is measured on."""
    host_memory_bytes: int
    """Host memory at the peak, at most."""
    gpu_memory_bytes: int
    """GPU memory at the peak, at most; 0 where none computes."""
    resume_bytes: int
    """Disk for the hidden states that an interrupted run goes on from."""


class EngineProblem(TypedDict):
    """One thing that an engine would do wrong with a checkpoint."""

    verdict: str
    """refused (it stops with an error), corrupted (it loads and is wrong), or warning (not verified)."""
    text: str
    """What, where and why."""
    source: str
    """Where that is known from: a file or an issue of the engine."""
    hint: str | None
    """What helps; null where nothing is known to."""
    other_tp: bool
    """Whether another tensor parallelism avoids it."""


class EngineCheck(TypedDict):
    """A checkpoint held against what one engine accepts."""

    engine: str
    """vllm, sglang or transformers."""
    version: str
    """Of the engine; unless one was asked for, the newest that is known here."""
    tp: int | None
    """Tensor parallelism that was checked for; null: what depends on it is told as a warning."""
    ok: bool
    """Whether nothing would be refused or corrupted. Warnings may remain."""
    problems: list[EngineProblem]
    """Worst first."""


class PlannedShard(TypedDict):
    """A file that will be written."""

    unit: str
    """What it holds, such as "layer 3"."""
    file: str
    """Its name."""
    size_bytes: int
    """Exactly."""


class HubReads(TypedDict):
    """What a run reads of a source on the Hub."""

    bytes: int
    """All that it asks for; where the source is kept (--keep-source) each byte once, whatever stands here."""
    times: float
    """The same, in sizes of the source."""
    seconds: float | None
    """At the rate that --measure found; null without it."""


class PlanDocument(TypedDict):
    """What `quantize` would do and need."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    source: str
    """The checkpoint to be quantized."""
    release: str | None
    """The published model that it is or was converted from; null for any other."""
    recipe: str
    """The recipe's name, or its file."""
    method: str
    """How codes are chosen: rtn, gptq, awq, or awq and gptq."""
    scale_search: str
    """How scales are chosen: absmax, mse, gram, or cast."""
    container: str
    """How the experts are stored: compressed-tensors, native or modelopt."""
    formats: dict[str, list[int]]
    """Format → the MoE layers that get it."""
    carve_outs: dict[str, str]
    """MoE layer that is kept → what it stays: bf16 or fp8."""
    source_bytes: int
    """The source's shards."""
    output_bytes: int
    """The output's shards, exactly."""
    output_tensor_bytes: int
    """The same without headers."""
    output_tensors: int
    """Tensors of the output."""
    output_bytes_by_role: dict[str, int]
    """Kind of weight → bytes of the output."""
    device: str
    """cpu or cuda: what would compute."""
    host_memory_bytes: int
    """Host memory at the run's peak, at most."""
    gpu_memory_bytes: int
    """GPU memory at the run's peak, at most; 0 where none computes."""
    machine: MachineMemory
    """What this machine has."""
    experts_at_once: int
    """Experts that are in memory together."""
    sensitivity: ForkNeeds | None
    """What `sensitivity` would need; null for a recipe that it refuses."""
    walk_back: WalkBackNeeds | None
    """What comes before anything is quantized; null where codes are chosen for what a projection answers."""
    estimate: RunEstimate | None
    """Time; null without --measure."""
    shards: list[PlannedShard]
    """In the order of writing."""
    side_files: dict[str, int]
    """Other file that is copied → bytes."""
    side_bytes: int
    """Sum of those."""
    drafter: CarriedDrafter | None
    """The drafter in the source's folder; null without one."""
    disk_free_bytes: int | None
    """Free bytes where --out lies; null without --out."""
    hub: HubReads | None
    """What is read from the Hub; null for a source on this machine."""
    notes: list[str]
    """What a user should know before starting."""
    engines: list[EngineCheck]
    """vLLM and SGLang, as far as it does not depend on how they are started."""


class FisherSettings(TypedDict):
    """What is walked back for the Fisher matrices of a recipe with `objective: kl`."""

    tokens: int
    """Tokens at most, in the first sequences of the calibration data."""
    draws: int
    """Labels drawn from the model's own prediction at each of them."""


class CalibrationSettings(TypedDict):
    """A recipe's `calibration:` block, every default written out."""

    set: NotRequired[str]
    """The data, where it is one set, file or folder; `data` is absent then."""
    data: NotRequired[list[str]]
    """The data, where it is several; `set` is absent then."""
    column: NotRequired[str]
    """Of the data's records, only that is read; absent: the first form that a record has."""
    sequences: int
    """Sequences at most."""
    tokens: int
    """Tokens per sequence."""
    propagate: str
    """What later layers are calibrated behind: quantized or original layers."""
    shrinkage: float | str
    """How far thin statistics are shrunk, n0 over the width; "auto": held-out tokens choose, layer by layer."""
    max_starved_experts: int | None
    """Starved experts of a layer from which on the run is stopped; null: it never is."""
    reconstruct: NotRequired[int]
    """Rounds in which an expert's projections are chosen together; absent for none."""
    reconstruct_layers: NotRequired[list[int]]
    """Layers of those rounds; absent: all."""
    fisher: NotRequired[FisherSettings]
    """What Fisher matrices are measured on; absent where codes are chosen for a projection's own output."""


# --- relayout ---------------------------------------------------------------------------------------------------------


class Change(TypedDict):
    """Something before and after."""

    before: str
    """In the source."""
    after: str
    """In the output."""


class WrittenShard(TypedDict):
    """A file that was written."""

    unit: str
    """What it holds, such as "layer 3"."""
    file: str
    """Its name."""
    size_bytes: int
    """Of the whole file."""
    sha256: str
    """Of the whole file, in hexadecimal."""


class RelayoutDocument(TypedDict):
    """What `relayout` wrote."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    source: str
    """The checkpoint that was read."""
    qkv: Change
    """How q, k and v lie on disk, in words."""
    dtypes: Change
    """Dtypes of q, k and v."""
    layers: int
    """Layers, MTP's among them, whose q, k and v were written anew."""
    source_bytes: int
    """The source's shards."""
    output_bytes: int
    """The output's shards."""
    notes: list[str]
    """What a user should know of the result."""
    shards: list[WrittenShard]
    """In the order of writing."""
    engines: list[EngineCheck]
    """vLLM and SGLang, as far as it does not depend on how they are started."""
    out: str
    """The folder that was written."""
    found_finished: bool
    """Whether the folder was finished before, by the same request, so that nothing was written."""
    elapsed_s: float
    """Seconds from the beginning of the verb to its end."""
