"""What a run needs of a machine, what the machine has, and the refusal where the one is more than the other.

Key idea: memory follows from the plan alone: how many chunks are in flight, how often a method holds a chunk in
float32, what tokens weigh where they rest. The sums are upper bounds that a run comes near (scripts/RESULTS.md has
what was measured). Where a GPU calibrates, experts go in the largest even chunks that fit there. A run is refused only
for what cannot fit at all; what other programs occupy at the moment may be free tomorrow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mimoquant.checkpoint.hf_files import CONFIG_NAME
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.machine.buffers import IDLE_BYTES
from mimoquant.machine.hashing import UNHASHED_BYTES
from mimoquant.machine.memory import Machine
from mimoquant.model.layout import PROJECTIONS
from mimoquant.model.media import MLP_PATCHES, PORTION_GROUPS, PORTION_PATCHES, QUERY_RUN
from mimoquant.model.tower_config import TowerConfig, read_tower_config
from mimoquant.planning.calibration_settings import Calibration
from mimoquant.planning.plan import CAST_CHUNK_BYTES, CHUNK_BYTES, CUDA_CHUNK_BYTES, Plan
from mimoquant.planning.units import Dequantize, Experts
from mimoquant.planning.writing import QUEUE_BYTES, writing_of
from mimoquant.quant.method import WALKED_COLUMNS, WALKED_FEWEST, WALKED_MOST, WALKED_TOKENS, WALKED_TURNS

if TYPE_CHECKING:
    from mimoquant.fisher.kept import Place
    from mimoquant.fisher.needs import FisherNeeds

_INTERPRETER_BYTES, _TORCH_BYTES, _CUDA_BYTES = 320 * 2**20, 400 * 2**20, 2 * 2**30
_GROUPS, _BLOCKS = 2**12, 3  # that go through a layer at once (`audio`); blocks in memory
_GROUP_ROWS = 2**16  # of tokens that go through a group of experts at once, the most (`dispatch`)
_AHEAD = 3  # chunks that a GPU holds as they were read, beside the one that it works on
# How many float32 matrices of the shape of the Gram matrix, and of gate and up together, a method holds an expert.
_WITH_GPTQ, _SEARCH_ONLY = (5, 7), (3, 4)
# More, where codes are chosen for the loss: of the metric of gate's and up's outputs, and of that of an expert's.
_OF_METRIC, _OF_OWN_METRIC = 3, 5
_DESCENDED_MATRICES = 12  # of gate's and up's shape, which descent for what experts answer holds
_LOSS_BYTES = 60 * 10**9  # of a GPU: above it a chunk for the loss is halved once, however large the GPU is
_REFINED_MATRICES = 12  # of a projection's shape, which the joint refinement holds


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes at the peak of a run, of one process. `gpu_bytes` is 0 where no GPU computes."""

    host_bytes: int
    gpu_bytes: int


def needs(plan: Plan, device: str = "cpu", ranks: int = 1) -> Needs:
    """What a process of a run needs on a kind of device ("cpu" or "cuda"), if `ranks` share the run."""
    cuda = plan.engine_device(device).startswith("cuda")
    steps = _unlike_steps(plan)
    source = max(_source_bytes(plan, step) for step in steps)
    output = max(sum(entry.size_bytes for entry in step.entries) for step in steps)
    queue = _written_bytes(plan, device)
    host = _INTERPRETER_BYTES + 3 * source + (1 + ranks) * output + queue + (_CUDA_BYTES if cuda else 0)
    if plan.recipe.calibration is None:
        return Needs(host, 6 * source if cuda else 0)
    states, seen = token_bytes(plan, ranks)
    experts = largest_chunk(plan)
    work = (
        seen
        + 2 * _gradient_bytes(plan)
        + max(
            _method_bytes(plan, experts),
            forward_bytes(plan, experts, _tokens(plan)),
            _answer_bytes(plan, experts, "cuda" if cuda else "cpu"),
            _refine_bytes(plan, experts, "cuda" if cuda else "cpu"),
        )
    )
    wants = Needs(host + _TORCH_BYTES + states + work, 0)
    if cuda:
        wants = Needs(
            host + states, work + _AHEAD * source + _begun_bytes(plan, experts) + _next_layers_bytes(plan) + 2**30
        )
    wants = _with_towers(plan, wants, states, cuda)
    back = walk_back_needs(plan, device, ranks) or wants  # one after the other
    return Needs(max(wants.host_bytes, back.host_bytes), max(wants.gpu_bytes, back.gpu_bytes))


def _written_bytes(plan: Plan, device: str) -> int:
    """What waits to be written or hashed, and memory that is kept on a CPU, without calibration, for what comes."""
    ways = writing_of(plan, device)
    if not plan.recipe.casts:
        cpu = plan.recipe.calibration is None and not plan.engine_device(device).startswith("cuda")
        return ways.queue_bytes + (IDLE_BYTES if cpu else 0)
    return max(ways.queue_bytes, QUEUE_BYTES) + IDLE_BYTES + ways.lanes * (UNHASHED_BYTES + CAST_CHUNK_BYTES)


def _with_towers(plan: Plan, layers: Needs, states: int, cuda: bool) -> Needs:
    """The most of both: layers, or before them the towers, should the data have images or sounds."""
    resting, working = tower_bytes(plan)
    host = _INTERPRETER_BYTES + _TORCH_BYTES + (_CUDA_BYTES if cuda else working) + states + resting
    return Needs(max(layers.host_bytes, host), max(layers.gpu_bytes, resting + working) if cuda else 0)


def tower_bytes(plan: Plan) -> tuple[int, int]:
    """Of a portion of images or sounds, which rests between two blocks, images on the device, sounds on the host (both
    are counted on both); and of the largest of them that a sequence holds, with a block, on its way through. 0 where
    there are no towers, or none that could run.

    What towers give takes as much as hidden states of those tokens, until they are embedded: only the data tell how
    many there are (`planning.notes`).
    """
    towers, calibration = _towers(plan), plan.recipe.calibration
    if towers is None or calibration is None:
        return 0, 0
    resting, working, tokens = 0, 0, _tokens(plan)
    if (vision := towers.vision) is not None:
        heads = (vision.heads + 2 * vision.kv_heads) * vision.head_dim
        block = vision.hidden * (heads + vision.heads * vision.head_dim + 3 * vision.intermediate)
        run, patches = max(QUERY_RUN, 2 * vision.window), vision.merge**2 * calibration.tokens
        # states and both rotations; which keys a run sees, should no two images be of one size
        beside = vision.hidden + 4 * vision.head_dim + vision.heads // vision.kv_heads * (run + 2 * vision.window)
        resting = 4 * beside * min(PORTION_PATCHES, vision.merge**2 * tokens)
        working = 4 * patches * (6 * vision.hidden + 5 * heads + vision.patch_width)
        working += 4 * min(patches, MLP_PATCHES) * 6 * vision.intermediate
        working += _BLOCKS * 2 * max(block, vision.merged**2)
    if (audio := towers.audio) is not None:
        resting = max(resting, 4 * audio.grouped * min(PORTION_GROUPS, tokens))
        working = max(working, 4 * _GROUPS * audio.group * (8 * audio.hidden + 3 * audio.intermediate))
    return resting, working


def _towers(plan: Plan) -> TowerConfig | None:
    """None where no run with media gets as far as memory: that is told when there are media."""
    with contextlib.suppress(CheckpointError):
        return read_tower_config(plan.layout.config, CONFIG_NAME)
    return None


def _unlike_steps(plan: Plan) -> list[Experts | Dequantize]:
    """One of each size: of a layer's experts, which are alike, one step of each number of them."""
    steps = (step for unit in plan.units for step in unit.steps if isinstance(step, Experts | Dequantize))
    keyed = {
        (step.layer, step.end - step.begin) if isinstance(step, Experts) else step.weight.name: step for step in steps
    }
    return list(keyed.values())


def walk_back_needs(plan: Plan, device: str = "cpu", ranks: int = 1, states: Place = "files") -> FisherNeeds | None:
    """Of the walk that comes before anything is quantized, where codes are chosen for the loss."""
    calibration = plan.recipe.calibration
    if calibration is None or calibration.fisher is None:
        return None
    from mimoquant.fisher.needs import fisher_needs  # torch is loaded only where it is needed
    from mimoquant.fisher.walk import FisherSettings

    settings = FisherSettings(calibration.fisher_draws, states=states)
    tokens = calibration.fisher_sequences * calibration.tokens
    return fisher_needs(plan.layout.geometry, tokens, settings, device, ranks)


def states_place(plan: Plan, device: str, has: Machine, ranks: int = 1) -> Place:
    """Where the hidden states of that walk rest: on the host, where they fit into what is free of it."""
    on_host = walk_back_needs(plan, device, ranks, "host")
    return "host" if on_host is None or on_host.host_bytes <= has.host_free_bytes else "files"


def left_bytes(plan: Plan) -> int:
    """Files that the walk back leaves until the run's end: a matrix and gradients a layer."""
    geometry = plan.layout.geometry
    return (4 * geometry.hidden**2 + _gradient_bytes(plan)) * (geometry.layers - min(geometry.moe_layers))


def _gradient_bytes(plan: Plan) -> int:
    """Of a layer, as the walk back keeps them."""
    calibration = plan.recipe.calibration
    if calibration is None or calibration.fisher is None:
        return 0
    tokens = calibration.fisher_sequences * calibration.tokens
    return 2 * calibration.fisher_draws * tokens * plan.layout.geometry.hidden


def disk_bytes(plan: Plan, device: str, has: Machine, ranks: int = 1) -> int:
    """What a run writes, at its peak."""
    output = plan.shard_bytes + plan.side_bytes
    back = walk_back_needs(plan, device, ranks, states_place(plan, device, has, ranks))
    return output if back is None else max(back.file_bytes, output + left_bytes(plan))


def lighter_on_disk(plan: Plan, device: str, has: Machine, room_bytes: int, ranks: int = 1) -> str | None:
    """The hint for a disk that has room for so much only; None where no lighter objective would fit it."""
    return lighter_objective(plan, lambda changed: disk_bytes(changed, device, has, ranks) <= room_bytes)


def _source_bytes(plan: Plan, step: Experts | Dequantize) -> int:
    if isinstance(step, Dequantize):
        return step.weight.size_bytes
    return expert_bytes(plan, step.layer, step.begin) * (step.end - step.begin)


def expert_bytes(plan: Plan, layer: int, expert: int) -> int:
    """An expert of the source, with its scales, as it is read."""
    weights = (plan.layout.expert(layer, expert, projection) for projection in PROJECTIONS)
    as_codes = plan.recipe.casts and plan.carve_outs.get(layer) != "bf16"
    return sum(weight.loaded_bytes(as_codes=as_codes) for weight in weights)


def _tokens(plan: Plan) -> int:
    calibration = plan.recipe.calibration
    return calibration.sequences * calibration.tokens if calibration else 0


def token_bytes(plan: Plan, ranks: int) -> tuple[int, int]:
    """Hidden states (float32) on the host, and beside the weights: what experts see (bfloat16, of all ranks) and what
    they add (float32)."""
    tokens, width = _tokens(plan), plan.layout.geometry.hidden
    return 4 * tokens * width // ranks, 2 * tokens * width + 4 * tokens * width // ranks


def near_bytes(plan: Plan, device: str, has: Machine, ranks: int = 1) -> int:
    """Hidden states that rest on a GPU between two layers, beside all that is needed: all of them, where it has room
    for them, or none."""
    states = token_bytes(plan, ranks)[0]
    return states if needs(plan, device, ranks).gpu_bytes + states <= has.gpu_bytes else 0


def _begun_bytes(plan: Plan, experts: int) -> int:
    """What a GPU still holds of the chunk before: its weights as they were and as they are read, and codes."""
    geometry = plan.layout.geometry
    return 5 * experts * 3 * geometry.hidden * geometry.expert_intermediate


def _next_layers_bytes(plan: Plan) -> int:
    """Of the two layers without their experts that a GPU holds ahead."""
    return 2 * max(
        sum(entry.size_bytes for step in unit.steps if not isinstance(step, Experts) for entry in step.entries)
        for unit in plan.units
        if unit.layer is not None
    )


def _method_bytes(plan: Plan, experts: int) -> int:
    width, inner = plan.layout.geometry.hidden, plan.layout.geometry.expert_intermediate
    squares, matrices = _WITH_GPTQ if plan.recipe.expert_method().gptq else _SEARCH_ONLY
    felt = plan.recipe.objective == "kl"
    metrics = max(_OF_METRIC * (2 * inner) ** 2 + width**2, _OF_OWN_METRIC * width**2) if felt else 0
    return experts * 4 * (squares * width**2 + matrices * 2 * inner * width + metrics)


def _walked_tokens(plan: Plan, experts: int, device: str) -> int:
    """Of the experts of a chunk that are walked together, padding counted in."""
    most, geometry = max(WALKED_TOKENS[device], WALKED_MOST), plan.layout.geometry
    return min(most, 2 * _tokens(plan) * geometry.top_k * experts // geometry.experts)


def _answer_bytes(plan: Plan, experts: int, device: str) -> int:
    """A chunk, its Gram matrices and metrics, what descent of gate and up holds, its tokens, and those on their way."""
    if plan.recipe.objective != "kl":
        return 0
    width, inner = plan.layout.geometry.hidden, plan.layout.geometry.expert_intermediate
    matrices = 4 * (2 * width**2 + 4 * (2 * inner) ** 2 + inner**2) + (14 + 8 * _DESCENDED_MATRICES) * inner * width
    routed = 2 * _tokens(plan) * plan.layout.geometry.top_k * experts // plan.layout.geometry.experts
    resting = min(experts * WALKED_MOST, routed) * 4 * (width + 6 * inner)
    return experts * matrices + resting + _walked_tokens(plan, experts, device) * 4 * (2 * width + 10 * inner)


def _refine_bytes(plan: Plan, experts: int, device: str) -> int:
    """A chunk, its Gram matrices and, of the experts that are refined together, what they hold and their tokens."""
    calibration, geometry = plan.recipe.calibration, plan.layout.geometry
    if calibration is None or not calibration.reconstruct:
        return 0
    width, inner = geometry.hidden, geometry.expert_intermediate
    tokens = _walked_tokens(plan, experts, device)
    block = max(WALKED_COLUMNS, *(fmt.group_size for fmt in plan.formats.values()))
    felt = 2 if plan.recipe.objective == "kl" else 0  # F and its root
    matrices = (
        felt * width**2
        + _REFINED_MATRICES * inner * width
        + width**2
        + 4 * inner**2
        + 3 * inner // WALKED_TURNS * block**2
    )
    return (
        experts * (4 * ((1 + felt) * width**2 + inner**2) + 18 * inner * width)
        + 4 * min(experts, WALKED_TOKENS[device] // WALKED_FEWEST) * matrices
        + 4 * tokens * ((4 + felt) * width + 5 * inner)
    )


def forward_bytes(plan: Plan, experts: int, tokens: int) -> int:
    """A group of so many tokens on its way through so many experts: in, twice inside, out, all float32 and some in
    parts."""
    geometry = plan.layout.geometry
    routed = tokens * geometry.top_k * experts // geometry.experts
    weights = experts * 3 * geometry.hidden * geometry.expert_intermediate * 2
    return min(_GROUP_ROWS, 2 * routed) * 4 * (3 * geometry.hidden + 3 * geometry.expert_intermediate) + 2 * weights


def fitting_plan(make: Callable[[int], Plan], device: str, has: Machine, ranks: int = 1) -> Plan:
    """What `make` plans for chunks of so many source bytes; where a GPU calibrates, the largest chunks that fit it, or
    for the loss one in two of their experts, should that keep within `_LOSS_BYTES`."""
    plan = make(CHUNK_BYTES)
    if plan.recipe.calibration is None or not device.startswith("cuda"):
        return plan
    size = CUDA_CHUNK_BYTES
    plan = make(size)
    if plan.recipe.objective == "kl" and needs(plan, device, ranks).gpu_bytes > _LOSS_BYTES:
        halved = make(size // 2)
        if needs(halved, device, ranks).gpu_bytes <= _LOSS_BYTES:
            size, plan = size // 2, halved
    while needs(plan, device, ranks).gpu_bytes > has.gpu_bytes and largest_chunk(plan) > 1:
        size //= 2
        plan = make(size)
    return replace(plan, gpu_bytes=has.gpu_bytes)


def largest_chunk(plan: Plan) -> int:
    """Experts that are in memory together."""
    return max(step.end - step.begin for unit in plan.units for step in unit.steps if isinstance(step, Experts))


def refusal(plan: Plan, device: str, has: Machine, ranks: int = 1) -> UsageError | None:
    """Why a plan cannot run on this machine, and what could; None where it can."""
    short = lacking(needs(plan, device, ranks), has)
    return too_little(plan, short, _what_would_fit(plan, device, ranks, has)) if short else None


def lacking(wants: Needs, has: Machine) -> tuple[str, int, int] | None:
    """Which memory is short, what is wanted and what there is; None where all is there."""
    pairs = {"memory": (wants.host_bytes, has.host_bytes), "GPU memory": (wants.gpu_bytes, has.gpu_bytes)}
    return next(((what, wanted, there) for what, (wanted, there) in pairs.items() if wanted > there), None)


def too_little(plan: Plan, short: tuple[str, int, int], hint: str) -> UsageError:
    """The refusal for what is `lacking`."""
    (what, wanted, there), folder = short, plan.layout.index.folder
    return UsageError(
        f"{folder}: needs about {wanted / 1e9:.2f} GB of {what}, here are {there / 1e9:.2f} GB", hint=hint
    )


def _what_would_fit(plan: Plan, device: str, ranks: int, has: Machine) -> str:
    """A lighter objective, or fewer tokens: of either what fits."""
    calibration = plan.recipe.calibration
    if calibration is None:
        return "a machine with more memory would fit"

    def wanted(changed: Plan) -> Needs:
        return needs(changed, device, ranks)

    def fewer(of: Calibration) -> str | None:
        return fewer_sequences(of.sequences, lambda n: wanted(_calibrated(plan, replace(of, sequences=n))), has)

    if lighter := lighter_objective(plan, lambda changed: lacking(wanted(changed), has) is None):
        return lighter
    ways = [fewer(calibration)]
    if calibration.fisher is not None and (plain := fewer(replace(calibration, fisher=None))) not in (None, *ways):
        ways.append(f"{plain} with --objective output")
    otherwise = "take fewer --tokens a sequence, a machine with more memory, or a recipe that does not calibrate"
    return "; ".join(filter(None, ways)) or otherwise


def lighter_objective(plan: Plan, fits: Callable[[Plan], bool]) -> str | None:
    """The hint that names the first of a half, a quarter, ... of the tokens that are walked back with which a plan
    fits, and whether it does with none."""
    calibration = plan.recipe.calibration
    if calibration is None or calibration.fisher is None:
        return None
    ways, tokens = [], calibration.fisher_sequences * calibration.tokens // 2
    while tokens >= calibration.tokens:
        if fits(_calibrated(plan, replace(calibration, fisher=replace(calibration.fisher, tokens=tokens)))):
            ways.append(f"calibration: {{fisher: {{tokens: {tokens}}}}} in the recipe")
            break
        tokens //= 2
    if fits(_calibrated(plan, replace(calibration, fisher=None))):
        ways.append("--objective output")
    return f"{', or '.join(ways)} would fit" if ways else None


def _calibrated(plan: Plan, calibration: Calibration) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, calibration=calibration))


def fewer_sequences(sequences: int, wanted: Callable[[int], Needs], has: Machine, least: int = 1) -> str | None:
    """The hint that names the first of a half, a quarter, ... of the sequences, `least` at least, that fits."""
    fewer = sequences // 2
    while fewer >= least:
        if lacking(wanted(fewer), has) is None:
            return f"--sequences {fewer} would fit"
        fewer //= 2
    return None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that a run spends reading, computing and writing, all at once; and what the two rates were. `starting_s`:
    before all that, whatever its size."""

    reading_s: float
    computing_s: float
    writing_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float  # of hashing alone, where no folder was given
    walking_back_s: float = 0.0  # of the computing, before anything is quantized
    starting_s: float = 0.0

    @property
    def bound(self) -> tuple[str, float]:
        """What takes longest, and how long."""
        times = {"reading": self.reading_s, "computing": self.computing_s, "writing": self.writing_s}
        return max(times.items(), key=lambda item: item[1])
