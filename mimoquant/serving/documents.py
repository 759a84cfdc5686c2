"""What `launch` says, field by field: what `--json` prints and the Python function returns. The check against an
engine, which `plan`, `relayout`, `sensitivity` and `verify` tell too, is `planning.documents.EngineCheck`.
"""

from __future__ import annotations

from typing import TypedDict


class ParallelLayout(TypedDict):
    """How GPUs share a model: `gpus` = `attention_tp` x `dp`."""

    gpus: int
    """GPUs, over all nodes."""
    attention_tp: int
    """GPUs that share one attention: its tensor parallelism."""
    dp: int
    """Such groups, each of which serves requests of its own."""
    ep: bool
    """Whether an expert is whole on its GPU (expert parallelism); otherwise each is cut over all GPUs."""


class PatchFacts(TypedDict):
    """A change to an engine that serving here once needed."""

    what: str
    """In words."""
    not_needed_from: str | None
    """The engine's version that has it; null where none is known to."""
    source: str
    """Where that is known from."""


class LaunchDocument(TypedDict):
    """The command that serves a checkpoint, and what to expect of it."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    checkpoint: str
    """The folder that is served."""
    engine: str
    """vllm or sglang."""
    version: str
    """Of the engine; unless one was asked for, the newest that is known here."""
    evidence: str
    """How it is known that this engine loads the experts' format, and from where."""
    minimum_version: str
    """The oldest version for which everything that this checkpoint needs is known to be right; or "not known"."""
    gpu: str
    """The kind of GPU, as people write it."""
    layout: ParallelLayout
    """How the GPUs share the model."""
    image: str
    """The engine's container image; its tag is not verified."""
    environment: dict[str, str]
    """Variables that the command needs; words in <> are to be filled in."""
    command: list[str]
    """The command, word by word; words in <> are to be filled in."""
    moe_backend: str | None
    """The kernels for experts that the engine will take or is told to take; null where it chooses by itself."""
    attention_backend: str
    """The kernels for attention."""
    context: int
    """Tokens that one sequence may have, an estimate from sizes."""
    weights_bytes: int
    """Weights on one GPU."""
    kv_bytes_per_token: int
    """KV cache that a token takes on one GPU."""
    expect: list[str]
    """Lines of the engine's log that say that the right code runs."""
    notes: list[str]
    """What a reader has to know, and what nobody has tried."""
    patches: list[PatchFacts]
    """Changes to the engine that this kind of GPU once needed."""
