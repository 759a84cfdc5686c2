"""What vLLM, SGLang and transformers accept of this family, as data.

Key idea: every row says for which versions it holds, what happens, how that is known and where it is written. A row is
`run` (tried with the engine, or with its own functions), `read` (in the source of the named version) or `unverified`
(follows from what is known, tried by nobody here); whoever prints a row prints that with it. Version ranges begin where
a row is first known to hold, not where it may first have held.

Left out: what only values can show (swapped gate and up, reversed nibbles, unshared NVFP4 global scales: all load
without a word, and `verify --source` proves them), TPU; kernels and kinds of GPU are in `gpus`. Sources: vLLM 0.32 and
0.33, SGLang 0.5.23 and transformers 5.17 themselves; for older versions their pull requests and release notes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mimoquant.errors import UsageError

VLLM, SGLANG, TRANSFORMERS = "vllm", "sglang", "transformers"
RIGHT, REFUSED, CORRUPTED = "right", "refused", "corrupted"
RUN, READ, UNVERIFIED = "run", "read", "unverified"

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """`read`: the newest version whose source these tables were taken from; the default of every check."""

    label: str
    read: str
    mtp_layers: int  # of the checkpoint's, how many it runs
    text_prefix: str  # what comes before `model.` where the checkpoint has towers
    image: str
    amd_image: str
    started: str  # its last line of start-up


ENGINES = {
    VLLM: Engine(
        "vLLM",
        "0.33.0",
        1,
        "language_model.",
        "vllm/vllm-openai:v{}",
        "vllm/vllm-openai-rocm:v{}",
        "Application startup complete.",
    ),
    SGLANG: Engine(
        "SGLang",
        "0.5.23",
        3,
        "",
        "lmsysorg/sglang:v{}",
        "lmsysorg/sglang:v{}-rocm<version>-<gpu>",
        "The server is fired up and ready to roll!",
    ),
    TRANSFORMERS: Engine("transformers", "5.17.0", 0, "", "", "", ""),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One fact: for `engine` from version `since` up to but not including `until`, `subject` has this `verdict`.

    `what` completes the sentence "SUBJECT ..." and says what the engine does. `tp`: the attention TP that RIGHT is
    bound to ("any", "divides the chunks", "is the chunks"); `otherwise` is the verdict at any other. `same_kv_heads`:
    it also needs as many KV heads in sliding-window layers as there are chunks.
    """

    engine: str
    subject: str
    verdict: str
    evidence: str
    source: str
    what: str = ""
    since: Version = ()
    until: Version | None = None
    tp: str = "any"
    otherwise: str = REFUSED
    same_kv_heads: bool = False
    hint: str | None = None


# --- formats of the routed experts: "<container> <format>" ------------------------------------------------------------

NATIVE_MXFP4, INT4, INT4_ASYMMETRIC = "native mxfp4", "compressed-tensors int4", "compressed-tensors int4 asymmetric"
CT_MXFP4, CT_NVFP4, BF16, FP8 = "compressed-tensors mxfp4", "compressed-tensors nvfp4", "bf16", "fp8"
MIXED, MO_NVFP4 = "mixed-precision with int4", "modelopt nvfp4"
UNLIKE = "experts in several formats or group sizes"
NVFP4 = CT_NVFP4, MO_NVFP4
NVFP4_INPUTS = "nvfp4 with input scales"  # of the kernels alone: it loads as NVFP4 does

FORMATS: tuple[Row, ...] = (
    Row(VLLM, NATIVE_MXFP4, CORRUPTED, READ, "pull request #45200, in release 0.24.0", until=(0, 24),
        what="is read as FP8: the key store_dtype is not known yet"),
    Row(VLLM, NATIVE_MXFP4, RIGHT, RUN, "0.33 on an H200 (Marlin), 0.32 on a CPU; release 0.24.0",
        since=(0, 24)),
    Row(VLLM, FP8, RIGHT, RUN, "0.26 on an H100 at TP 1 and 2", since=(0, 26)),
    Row(VLLM, BF16, RIGHT, RUN, "0.26 on an H100, 0.32 on a CPU", since=(0, 26)),
    Row(VLLM, INT4, RIGHT, RUN, "0.26 on an H100, 0.33 on an H200 (Marlin), 0.32 on a CPU",
        since=(0, 26)),
    Row(VLLM, INT4_ASYMMETRIC, RIGHT, RUN, "0.33 on an H200 (Marlin), 0.32 on a CPU",
        since=(0, 32)),
    Row(VLLM, CT_MXFP4, RIGHT, RUN, "0.33 on an H200, 0.26 on an H100 (Marlin), 0.32 on a CPU", since=(0, 26)),
    Row(VLLM, CT_NVFP4, RIGHT, RUN, "0.33 on an H200, 0.26 on an H100 (Marlin), 0.32 on a CPU", since=(0, 26)),
    Row(VLLM, MO_NVFP4, RIGHT, RUN, "0.33 on an H200 (Marlin), 0.32 on a CPU",
        since=(0, 32)),
    Row(VLLM, MIXED, RIGHT, RUN, "0.33 on an H200 and 0.32 on a CPU: int4, FP8, MXFP4, NVFP4 in one", since=(0, 32)),
    Row(SGLANG, NATIVE_MXFP4, RIGHT, READ, "pull request #40448 and the notes of release 0.5.21",
        since=(0, 5, 21), until=(0, 5, 23)),
    Row(SGLANG, NATIVE_MXFP4, RIGHT, RUN, "0.5.23 on an H200; its loader at TP 1 and 2", since=(0, 5, 23)),
    Row(SGLANG, FP8, RIGHT, READ, "mimo_v2.py of 0.5.17; its cookbook for V2.5",
        since=(0, 5, 17), until=(0, 5, 23)),
    Row(SGLANG, FP8, RIGHT, RUN, "0.5.23 on an H200: V2.5's layout, and V2-Flash's", since=(0, 5, 23)),
    Row(SGLANG, BF16, RIGHT, UNVERIFIED, "not tried"),
    Row(SGLANG, INT4, RIGHT, RUN, "0.5.23 on an H200; its loader at TP 1 and 2", since=(0, 5, 23)),
    Row(SGLANG, INT4_ASYMMETRIC, REFUSED, RUN, "the loader of 0.5.23: RuntimeError in _load_w13", since=(0, 5, 23),
        what="makes it stop: its loader does not turn weight_zero_point as it does codes and scales",
        hint="quantize with symmetric: true for this engine"),
    Row(SGLANG, CT_MXFP4, REFUSED, RUN, "the loader of 0.5.23; mxfp4.py and mimo_v2.py", since=(0, 5, 23),
        what="makes it stop with KeyError: its MXFP4 experts are called w13_weight, the file has weight_packed",
        hint="quantize with --container native"),
    Row(SGLANG, CT_NVFP4, RIGHT, RUN, "0.5.23 on an H200; its loader at TP 1 and 2", since=(0, 5, 23)),
    Row(SGLANG, MO_NVFP4, RIGHT, RUN, "0.5.23 on an H200 (Marlin); its loader at TP 1 and 2", since=(0, 5, 23)),
    Row(SGLANG, MIXED, REFUSED, READ, "compressed_tensors_wNa16_moe.py of 0.5.23", since=(0, 5, 23),
        what="makes it stop: its int4 experts need pack-quantized as the format of the whole checkpoint",
        hint="give all layers one format"),
    Row(TRANSFORMERS, NATIVE_MXFP4, CORRUPTED, RUN, "5.17 on a CPU, loading info", until=(5, 24),
        what="loads without the experts' scales: every weight_scale is reported as UNEXPECTED and dropped"),
    Row(TRANSFORMERS, NATIVE_MXFP4, REFUSED, RUN, "5.24 on a CPU: RuntimeError for sizes that do not match",
        since=(5, 24), what="makes it stop: packed experts have half the width"),
    Row(TRANSFORMERS, INT4, RIGHT, RUN, "5.17 with compressed-tensors 0.19, 5.24 with 0.20: the logits of the bf16 "
        "twin, bit for bit"),
    Row(TRANSFORMERS, INT4_ASYMMETRIC, REFUSED, RUN, "5.17, 5.24: RuntimeError in the conversion of weights",
        what="makes it stop: its conversion passes no weight_zero_point"),
    Row(TRANSFORMERS, CT_MXFP4, RIGHT, RUN, "5.17 with compressed-tensors 0.19, 5.24 with 0.20: exact"),
    Row(TRANSFORMERS, CT_NVFP4, CORRUPTED, RUN, "5.17: KL 2.8 against the bf16 twin", until=(5, 24),
        what="loads without the global scales: weight_global_scale is reported as UNEXPECTED and dropped"),
    Row(TRANSFORMERS, CT_NVFP4, CORRUPTED, RUN, "5.24 with compressed-tensors 0.20: experts against the bf16 twin's",
        since=(5, 24), what="takes weight_global_scale without a word and does not divide by it: experts are hundreds "
        "of times too large"),
    Row(TRANSFORMERS, MO_NVFP4, REFUSED, RUN, "5.17 on a CPU: RuntimeError for sizes that do not match",
        what="makes it stop: quant_method modelopt is unknown to it, and packed experts have half the width",
        hint="quantize with --container compressed-tensors"),
    Row(TRANSFORMERS, UNLIKE, REFUSED, RUN, "5.17 with compressed-tensors 0.19, 5.24 with 0.20: RuntimeError in the "
        "conversion of weights", what="makes it stop: it converts all experts by one scheme"),
)  # fmt: skip

# --- int4 experts of which a rank holds one group of inner channels, on GPUs (CPUs' kernels lay scales otherwise) -----

INT4S, ONE_GROUP = (INT4, INT4_ASYMMETRIC), "int4 with one group a rank"
GROUPS: tuple[Row, ...] = (
    Row(
        VLLM,
        ONE_GROUP,
        CORRUPTED,
        RUN,
        "0.33 on an H200 (Marlin): J .19 where the file has .045; 0.32's code is the same; pull request #50196",
        since=(0, 32),
        what="has the scales of gate and up put in another order than Marlin reads",
        hint="use a smaller TP, expert parallelism, or quantize with group_size: 32",
    ),
    Row(SGLANG, ONE_GROUP, RIGHT, READ, "compressed_tensors_wNa16_moe.py of 0.5.23"),
)

# --- a layer of experts that is kept: "<format of the rest>: <kind>", or "any: <kind>" --------------------------------

CARVE_OUTS: tuple[Row, ...] = (
    Row(VLLM, "any: bf16", RIGHT, RUN, "0.33 on an H200, 0.32 on a CPU, beside int4 and native MXFP4",
        since=(0, 26)),
    Row(VLLM, f"{MO_NVFP4}: bf16", RIGHT, RUN, "0.33 on an H200, 0.32 on a CPU: KL 0",
        since=(0, 32)),
    Row(VLLM, "any: fp8", RIGHT, RUN, "0.33 on an H200, 0.32 on a CPU, beside NVFP4", since=(0, 32)),
    Row(SGLANG, f"{CT_MXFP4}: bf16", CORRUPTED, READ, "compressed_tensors.py of 0.5.23, _is_mxfp4_moe",
        what="is taken for MXFP4 like the rest: the format is looked up for the whole checkpoint",
        hint="quantize without carve_outs for this engine"),
    Row(SGLANG, f"{MO_NVFP4}: bf16", RIGHT, RUN, "0.5.23 on an H200 (Marlin) and its loader", since=(0, 5, 23)),
    Row(SGLANG, "any: bf16", RIGHT, RUN, "0.5.23 on an H200 beside native MXFP4; its loader", since=(0, 5, 23)),
    Row(SGLANG, "any: fp8", RIGHT, RUN, "0.5.23 on an H200 and its loader, beside NVFP4", since=(0, 5, 23)),
    Row(TRANSFORMERS, "any: bf16", REFUSED, RUN, "5.24: RuntimeError in the conversion of weights", since=(5, 24),
        what="makes it stop: the conversion finds no packed experts",
        hint="quantize without carve_outs for this engine"),
    Row(TRANSFORMERS, "any: bf16", CORRUPTED, RUN, "5.17 on a CPU, loading info", until=(5, 24),
        what="loads with random weights: its experts are MISSING, and what the files hold is UNEXPECTED",
        hint="quantize without carve_outs for this engine"),
    Row(TRANSFORMERS, "any: fp8", REFUSED, RUN, "5.17, 5.24: RuntimeError in the conversion of weights",
        what="makes it stop: the conversion finds no packed experts",
        hint="quantize without carve_outs for this engine"),
)  # fmt: skip

# --- qkv on disk ------------------------------------------------------------------------------------------------------

SPLIT, FUSED_FP8, FUSED_BF16 = "split q, k, v", "fused FP8 qkv", "fused bf16 qkv"
CANONICAL_BF16, OTHER_FP8 = "fused bf16 [Q|K|V]", "fused FP8 qkv that is not in num_key_value_heads chunks"
PLAIN_MXFP8 = "MXFP8 qkv as [Q|K|V]"  # of ModelOpt's releases
DECLARED_SPLIT, RANKED_SPLIT = "attention_projection_layout 'split'", "split FP8 k with scale rows of its own per head"
_OTHER_ROWS = "gets scales of other rows: k at a TP below the chunks, a part of v at TP as many as those"
BF16_QKV = "mimoquant relayout --qkv split --dtype bf16"

QKV: tuple[Row, ...] = (
    Row(VLLM, SPLIT, RIGHT, RUN, "0.32 on a CPU: KL 0"),
    Row(VLLM, RANKED_SPLIT, CORRUPTED, RUN, "0.26 on an H100 at TP 1 and 2 of 2 chunks: KL .0035 and .12, of which "
        "such rows make .0027 and .12; adjust_block_scale_shard of 0.32 is the same",
        what=_OTHER_ROWS, hint=BF16_QKV),
    Row(VLLM, FUSED_FP8, RIGHT, READ, "issue #42803, pull request #45200", until=(0, 24), tp="is the chunks",
        otherwise=CORRUPTED, what="is cut into equal parts, which puts rows of q where k and v belong"),
    Row(VLLM, FUSED_FP8, RIGHT, READ, "pull request #45200, release 0.24.0", since=(0, 24), until=(0, 31),
        tp="divides the chunks", same_kv_heads=True, what="is asserted to split over the KV heads"),
    Row(VLLM, FUSED_FP8, RIGHT, READ, "pull request #57508, merged before release 0.31.0", since=(0, 31),
        until=(0, 32)),
    Row(VLLM, FUSED_FP8, RIGHT, RUN, "0.32 on a CPU at TP 1 of 2 chunks (FP8 again, but for TP as many as chunks)",
        since=(0, 32)),
    Row(VLLM, FUSED_BF16, CORRUPTED, RUN, "0.32 on a CPU: KL 2.75",
        what="is read as [Q|K|V]: the rank-interleaved order is only undone for FP8 with weight_scale_inv",
         hint="write split q_proj, k_proj, v_proj: mimoquant relayout --qkv split"),
    Row(VLLM, CANONICAL_BF16, RIGHT, RUN, "0.32 on a CPU: KL 0; its MTP block is right at TP 1 only (read)"),
    Row(VLLM, OTHER_FP8, CORRUPTED, READ, "mimo_v2.py of 0.32, _shard_fp8_qkv_proj: ckpt_tp is num_key_value_heads",
        what="is read as if it were", hint=BF16_QKV),
    Row(VLLM, PLAIN_MXFP8, REFUSED, READ, "mimo_v2.py of 0.33, _shard_fp8_qkv_proj",
        what="makes it stop: any FP8 qkv_proj is taken for interleaved 128x128 blocks, whose scale has fewer rows",
        hint="write split q_proj, k_proj, v_proj"),
    Row(SGLANG, SPLIT, RIGHT, RUN, "the loader of 0.5.23 at TP 1, 2 and 4: difference 0.0"),
    Row(SGLANG, DECLARED_SPLIT, REFUSED, UNVERIFIED, "a source older than 0.5.23, which raises for this value",
        until=(0, 5, 23), what="may make it stop: expected 'fused_qkv' or unset"),
    Row(SGLANG, RANKED_SPLIT, CORRUPTED, RUN, "the loader of 0.5.23 at TP 1 and 2: its scales, read in blocks of 128 "
        "rows, are those of other rows, as in vLLM", what=_OTHER_ROWS, hint=BF16_QKV),
    Row(SGLANG, FUSED_FP8, RIGHT, RUN, "the loader of 0.5.23 at TP 1 and 2 of 2 chunks", tp="divides the chunks",
        what="stops the start: MiMoV2 fused qkv_proj checkpoint is TP-interleaved"),
    Row(SGLANG, FUSED_BF16, RIGHT, RUN, "the loader of 0.5.23: 33-38 % row error at TP 1 and 2 of 4",
         tp="is the chunks", otherwise=CORRUPTED, what="is merged without undoing the rank-interleaved order",
         hint="mimoquant relayout --qkv split"),
    Row(SGLANG, CANONICAL_BF16, RIGHT, RUN, "the loader of 0.5.23: right at TP 1, wrong rows at TP 2 and 4",
        tp="is the chunks", otherwise=CORRUPTED, what="is cut into equal parts, which puts rows of q where k belongs",
        hint="mimoquant relayout --qkv split"),
    Row(SGLANG, OTHER_FP8, CORRUPTED, READ, "model_config.py of 0.5.23: the chunks are num_key_value_heads",
        what="is read as if it were", hint=BF16_QKV),
    Row(SGLANG, PLAIN_MXFP8, CORRUPTED, READ, "mimo_v2.py of 0.5.23, load_mimo_v2_qkv_proj_weight", since=(0, 5, 23),
        what="is cut into ranks as if it were interleaved, for config.json says fused_qkv",
        hint="write split q_proj, k_proj, v_proj"),
    Row(TRANSFORMERS, SPLIT, RIGHT, RUN, "5.17 on a CPU"),
    Row(TRANSFORMERS, RANKED_SPLIT, RIGHT, UNVERIFIED, "not tried"),
    Row(TRANSFORMERS, FUSED_FP8, RIGHT, UNVERIFIED, "left to the checkpoint's remote code"),
    Row(TRANSFORMERS, FUSED_BF16, RIGHT, UNVERIFIED, "left to the checkpoint's remote code"),
    Row(TRANSFORMERS, CANONICAL_BF16, RIGHT, UNVERIFIED, "left to the checkpoint's remote code"),
    Row(TRANSFORMERS, OTHER_FP8, RIGHT, UNVERIFIED, "left to the checkpoint's remote code"),
    Row(TRANSFORMERS, PLAIN_MXFP8, RIGHT, UNVERIFIED, "left to the checkpoint's remote code"),
)  # fmt: skip

# --- the router: V2.6's weight and config are bf16 --------------------------------------------------------------------

BF16_ROUTER = "a router in bf16"
ROUTERS: tuple[Row, ...] = (
    Row(
        VLLM,
        BF16_ROUTER,
        CORRUPTED,
        READ,
        "mimo_v2.py of 0.26; pull request #57784 is in release 0.31.0, the first that its recipe names for V2.6",
        until=(0, 31),
        hint="use 0.31.0 or newer",
        what="chooses experts by logits and a correction bias that are rounded to bf16",
    ),
    Row(
        VLLM, BF16_ROUTER, RIGHT, RUN, "0.32's own gate on a CPU; mimo_v2.py and gate_linear.py of 0.33", since=(0, 31)
    ),
    Row(SGLANG, BF16_ROUTER, RIGHT, RUN, "0.5.23's own gate on a CPU; mimo_v2.py of 0.5.17, which takes it as float32"),
)

# --- towers ----------------------------------------------------------------------------------------------------------

PLAIN_SOUND = "an audio tower in a checkpoint without quantization_config"
TOWERS: tuple[Row, ...] = (
    Row(
        VLLM,
        PLAIN_SOUND,
        REFUSED,
        RUN,
        "0.32 on a CPU: ValueError of track_weights_loading; the same in 0.33 (read)",
        since=(0, 32),
        hint="start it with --model-loader-extra-config '{\"enable_weights_track\": false}'",
        what="makes it stop: it misses audio_encoder.input_local_transformer.embed_tokens, which no release has",
    ),
)

# --- FP8 beside the experts in ModelOpt's container -------------------------------------------------------------------

MO_BLOCKS = "FP8_BLOCK_SCALES beside the experts"
BLOCKS: tuple[Row, ...] = (
    Row(VLLM, MO_BLOCKS, REFUSED, RUN, "0.32 on a CPU: KeyError; LINEAR_ALGOS in its modelopt.py; issue #55496 and "
        "pull request #50617 are open",
        what="makes it stop with KeyError at weight_scale_inv: it has no linear method of this name, and builds bf16",
        hint="leave --dense fp8 out: attention, dense MLP and MTP become bf16"),
    Row(SGLANG, MO_BLOCKS, RIGHT, RUN, "the loader of 0.5.23 at TP 1 and 2 of 2 chunks", since=(0, 5, 23)),
    Row(TRANSFORMERS, MO_BLOCKS, REFUSED, UNVERIFIED, "quant_method modelopt is unknown to it"),
)  # fmt: skip

# --- patches that the first public deployments carried ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patch:
    """What a public deployment changed in vLLM, and from which version that is part of it (None: not known)."""

    gpu: str
    what: str
    since: str | None
    source: str


PATCHES = (
    Patch("a100", "Triton attention on SM80, and V padded from 128 to 192 for it: TRITON_ATTN_DIFFKV takes 192/128 as "
          "they are", "0.24.0", "pull request #41797; the patch held it to be wrong on Ampere, not verified"),
    Patch("a100", "fused qkv cut back into ranks: done by the loader, and not needed where q, k, v are split",
          "0.32.0", "pull requests #45200 and #57508"),
    Patch("a100", "LayerNorm in the vision merger", None, "covered by vLLM 0.33"),
    Patch("gb10", "Triton attention for 192/128 on SM121: TRITON_ATTN_DIFFKV", "0.24.0", "pull request #41797"),
    Patch("gb10", "FP8 KV cache in TRITON_ATTN_DIFFKV", "0.32.0", "triton_attn_diffkv.py of 0.32"),
    Patch("gb10", "DFlash drafts for omni checkpoints (SupportsEagle3)", "0.32.0", "mimo_v2_omni.py of 0.32"),
    Patch("gb10", "quantization metadata found under model.mtp for omni checkpoints", None,
          "not needed where the config targets experts by regex"),
)  # fmt: skip


def parse_version(text: str) -> Version:
    """'0.33.0', 'v0.33' or '0.5.23.post1' → numbers. Raises UsageError."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text)
    if not found:
        raise UsageError(f"--engine-version {text}: is no version", hint="give numbers, such as 0.33.0")
    return tuple(int(part) for part in found[1].split("."))


def rows_for(table: tuple[Row, ...], engine: str, subject: str, version: Version) -> Row | None:
    """The row that holds for this version, or None where nothing is known."""
    for row in table:
        held = row.since <= version and (row.until is None or version < row.until)
        if held and (row.engine, row.subject) == (engine, subject):
            return row
    return None


def known_since(engine: str, subject: str) -> Version:
    """From which version on a subject is known to be right, without a gap; () where it always was, or never is."""
    tables = (*FORMATS, *CARVE_OUTS, *QKV, *ROUTERS, *BLOCKS)
    rows = [row for row in tables if (row.engine, row.subject, row.verdict) == (engine, subject, RIGHT)]
    rows = [row for row in rows if not row.same_kv_heads]  # right for some models only
    since = max((row.since for row in rows if row.until is None), default=())
    while earlier := [row.since for row in rows if row.until == since and row.until]:
        since = min(earlier)
    return since
