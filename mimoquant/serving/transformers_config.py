"""Which of config.json's keys transformers 5.17 and 5.24 read otherwise than the engines do.

Key idea: its `mimo_v2_flash` class ignores `hybrid_layer_pattern`, `moe_layer_freq`, `rope_theta`, `swa_*` and
`layernorm_epsilon`, and falls back to V2-Flash's values where its own keys are absent. What falls back to another value
than the published keys say loads and computes another model.
"""

from __future__ import annotations

from collections.abc import Iterator

from mimoquant.serving import contracts as c
from mimoquant.serving.served import Served

Found = tuple[str, str, str, str | None]  # verdict, text, source, hint
_SOURCE = "transformers 5.17, configuration of mimo_v2_flash"
_DEFAULTS: dict[str, tuple[str, float]] = {  # key it reads → (published key, what it takes without)
    "rms_norm_eps": ("layernorm_epsilon", 1e-5),
    "sliding_window": ("sliding_window_size", 128),
}
_WINDOW_READ = (5, 24)  # it reads `sliding_window_size` before `sliding_window`


def config_problems(checkpoint: Served, version: c.Version) -> Iterator[Found]:
    """Keys that mean another model there."""
    config, geometry = checkpoint.config, checkpoint.geometry
    if geometry.model_type != "mimo_v2_flash":
        if not config.get("auto_map"):
            yield (
                c.REFUSED,
                f"config.json: model_type {geometry.model_type!r} has no class in transformers 5.17 and "
                "no auto_map names one",
                "transformers 5.17",
                "copy the published remote code",
            )
        else:
            yield (
                "warning",
                f"config.json: model_type {geometry.model_type!r} loads by its remote code, which is not verified",
                "transformers 5.17",
                None,
            )
        return
    layers = geometry.layers
    if "layer_types" not in config:
        default = tuple(not (n == 0 or n % 6 == 5) for n in range(layers))
        wrong = [n for n in range(layers) if default[n] != geometry.sliding[n]]
        if wrong:
            yield _wrong("layer_types", f"layer {wrong[0]} and {len(wrong) - 1} others get the other kind of attention")
    if "mlp_layer_types" not in config and list(geometry.moe) != [n > 0 for n in range(layers)]:
        yield _wrong("mlp_layer_types", "only layer 0 is taken for dense")
    if "rope_parameters" not in config:
        for key, default_theta in (("rope_theta", 5e6), ("swa_rope_theta", 1e4), ("partial_rotary_factor", 0.334)):
            if config.get(key, default_theta) != default_theta:
                yield _wrong("rope_parameters", f"{key} is {config[key]}, taken is {default_theta:g}")
    window, reads_window = config.get("sliding_window_size"), version >= _WINDOW_READ
    if reads_window and window is not None:
        yield (
            "warning",
            f"config.json: sliding_window_size {window} is read as so many tokens before the query, {window + 1} keys "
            f"in all, as SGLang does; vLLM and J know {window}",
            "transformers 5.24, configuration of mimo_v2_flash (run)",
            None,
        )
    for key, (published, fallback) in _DEFAULTS.items():
        if key == "sliding_window" and reads_window and window is not None:
            continue
        if key not in config and config.get(published, fallback) != fallback:
            yield _wrong(key, f"{published} is {config[published]}, taken is {fallback:g}")


def _wrong(key: str, what: str) -> Found:
    return (c.CORRUPTED, f"config.json: {key} is absent, so {what}", _SOURCE, f"add {key}")
