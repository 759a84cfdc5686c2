"""What the libraries that will read an output say of it: safetensors, compressed-tensors, transformers.

Key idea: this program's own readers were written beside its writers, and could share their mistakes; and what others
wrote or edited is held against nothing of ours. So each file is read as its users read it: headers by safetensors,
`quantization_config` by compressed-tensors, tokenizer and chat template by transformers, without the folder's code and
without a network. Their objections are told in their words. Headers and small files only; no weight is read.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from mimoquant.calibration.tokenizer import go_offline, one_line, tokenizer_of_transformers
from mimoquant.checkpoint.folders import open_inside
from mimoquant.checkpoint.hf_files import CONFIG_NAME
from mimoquant.checkpoint.index import DTYPE_BYTES, CheckpointIndex, TensorInfo, read_json_inside
from mimoquant.errors import CheckpointError
from mimoquant.model.config_keys import text_keys
from mimoquant.model.geometry import Geometry
from mimoquant.model.layout import PROJECTIONS, expert_module
from mimoquant.weights.container import COMPRESSED_TENSORS

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_GREETING = [{"role": "user", "content": "Hello"}]


@dataclass
class Answers:
    """What the libraries said. `checked`: what was asked of them → how often."""

    problems: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)


def ask_libraries(index: CheckpointIndex, geometry: Geometry, source: Path | None = None) -> Answers:
    """Have each library read its part of a checkpoint folder, whose own headers are `index`.

    Args:
        source: what it was made from. What transformers says of that folder's tokenizer too is told, and no problem.
    """
    go_offline()  # before any of them is loaded
    answers = Answers()
    answers.problems += _by_safetensors(index, answers)
    answers.problems += _misaligned(index)
    try:
        keys = text_keys(read_json_inside(index.folder, CONFIG_NAME), CONFIG_NAME)
        quantization = keys.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == COMPRESSED_TENSORS:
            answers.problems += _by_compressed_tensors(index, quantization, geometry, answers)
        found = list(_by_transformers(index.folder, keys.get("vocab_size"), answers))
        known = set(_by_transformers(source, keys.get("vocab_size"), Answers())) if found and source else set()
        answers.problems += [problem for problem in found if problem not in known]
        answers.set_aside += [f"{problem}; so it is with the source's" for problem in found if problem in known]
    except CheckpointError as error:
        answers.problems.append(str(error))
    return answers


# --- safetensors ------------------------------------------------------------------------------------------------------


def _by_safetensors(index: CheckpointIndex, answers: Answers) -> Iterator[str]:
    """Names, dtypes and shapes of every shard, held against our reading of them."""
    import safetensors

    name = f"safetensors {safetensors.__version__}"
    in_order = sorted(index.tensors.values(), key=lambda info: info.file)
    for file, infos in groupby(in_order, key=lambda info: info.file):
        answers.checked["shards by safetensors"] += 1
        try:
            with open_inside(index.folder, file) as handle:
                path = f"/proc/self/fd/{handle.fileno()}"  # the file that was resolved and checked
                with safetensors.safe_open(path, framework="np") as shard:
                    yield from (f"{file}: {name} {problem}" for problem in _unlike(shard, list(infos)))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            yield f"{file}: {name} refuses it ({one_line(error)})"


def _unlike(shard: Any, infos: list[TensorInfo]) -> Iterator[str]:
    names = set(shard.keys())
    if strange := names ^ {info.name for info in infos}:
        yield f"finds {len(names)} tensors, here are {len(infos)}, first {min(strange)}"
    for info in infos:
        if info.name in names:
            tensor = shard.get_slice(info.name)
            found = (tensor.get_dtype(), tuple(tensor.get_shape()))
            if found != (info.dtype, info.shape):
                yield f"reads {info.name} as {found[0]}{list(found[1])}, here it is {info.dtype}{list(info.shape)}"


def _misaligned(index: CheckpointIndex) -> Iterator[str]:
    """Tensors that readers which map a file cannot take as they lie; the library reads them, and says nothing."""
    wrong = [info for info in index.tensors.values() if info.offset % DTYPE_BYTES[info.dtype]]
    if wrong:
        first = min(wrong, key=lambda info: (info.file, info.offset))
        yield (
            f"{first.file}: {_with_others(first.name, len(wrong))} begin at byte {first.offset}, no multiple of the "
            f"{DTYPE_BYTES[first.dtype]} bytes of {first.dtype}"
        )


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def _by_compressed_tensors(
    index: CheckpointIndex, quantization: dict[str, Any], geometry: Geometry, answers: Answers
) -> Iterator[str]:
    """The scheme that it resolves for each expert, and for each matrix beside them, against what is stored."""
    with _no_folder_of_torch():
        from mimoquant.output.schemes import NAME, Schemes, difference, objection

    stored = _stored_modules(index)
    shapes: dict[str, tuple[int, ...]] = {
        expert_module(layer, expert, projection): geometry.expert_shape(projection)
        for layer in geometry.moe_layers
        for expert in range(geometry.experts)
        for projection in PROJECTIONS
    }
    shapes |= {name: held["weight"].shape for name, held in stored.items() if name not in shapes and "weight" in held}
    try:
        schemes = Schemes(quantization)
        groups = schemes.groups(list(shapes))
        wanted = {name: group and schemes.tensors(group, shapes[name]) for name, group in groups.items()}
    except Exception as error:  # whatever it raises is its objection
        yield f"{CONFIG_NAME}: {NAME} refuses its quantization_config ({objection(error)})"
        return
    found: dict[tuple[str | None, str], list[str]] = {}
    for name, group in groups.items():
        if problem := difference(wanted[name] or None, stored.get(name, {})):
            found.setdefault((group, problem), []).append(name)
    answers.checked["modules by compressed-tensors"] += len(groups)
    for (group, problem), modules in found.items():
        by = f" by {group}" if group else ""
        yield f"{_with_others(modules[0], len(modules))}: {NAME}{by} {problem}"


@contextlib.contextmanager
def _no_folder_of_torch() -> Iterator[None]:
    """Where torch's compiler is imported, as transformers' models do, it makes a folder for what it compiles, of which
    nothing is used here: it gets one that does not stay."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    kept = os.environ.get(_TORCH_CACHE)
    with tempfile.TemporaryDirectory(prefix="mimoquant-") as folder:
        os.environ[_TORCH_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[_TORCH_CACHE]
            if kept is not None:
                os.environ[_TORCH_CACHE] = kept


def _stored_modules(index: CheckpointIndex) -> dict[str, dict[str, TensorInfo]]:
    """Module → what is stored of it: experts, and the matrices of decoder layers and head that are Linear modules."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in index.tensors.items():
        module, _, suffix = name.rpartition(".")
        linear = (module.startswith("model.layers.") and module.endswith("_proj")) or module == "lm_head"
        if ".mlp.experts." in module or (linear and len(info.shape) == 2 and not suffix.endswith("_inv")):
            found.setdefault(module, {})[suffix] = info
    return found


def _with_others(first: str, count: int) -> str:
    return f"{first} and {count - 1} others" if count > 1 else first


# --- transformers -----------------------------------------------------------------------------------------------------


def _by_transformers(folder: Path, vocab: object, answers: Answers) -> Iterator[str]:
    """The tokenizer as AutoTokenizer builds it, and each of its templates."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return
    import transformers

    name = f"transformers {transformers.__version__}"
    try:
        tokenizer = tokenizer_of_transformers(folder)
    except CheckpointError as error:
        yield str(error)
        return
    except Exception as error:  # whatever it raises is its objection
        if "trust_remote_code" in str(error) and _needs_its_own_code(folder):
            answers.set_aside.append("tokenizer: is built by code of its own, which is not run")
        else:
            yield f"tokenizer: {name} cannot build it ({one_line(error)})"
        return
    answers.checked["tokenizer by transformers"] += 1
    word, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    if isinstance(vocab, int) and last >= vocab:
        yield f"tokenizer: {name} gives {word!r} the id {last}, {CONFIG_NAME} has {vocab} ids (vocab_size)"
    yield from (f"chat template: {name} {problem}" for problem in _templates(tokenizer, answers))


def _needs_its_own_code(folder: Path) -> bool:
    try:
        named = read_json_inside(folder, "tokenizer_config.json").get("auto_map")
    except CheckpointError:
        return False
    return isinstance(named, list) or (isinstance(named, dict) and "AutoTokenizer" in named)


def _templates(tokenizer: Any, answers: Answers) -> Iterator[str]:
    """Each is compiled and rendered; one that asks for other messages than a greeting, in its own words, may."""
    from jinja2 import TemplateError, TemplateSyntaxError

    held = tokenizer.chat_template or {}
    for name, template in ({"default": held} if isinstance(held, str) else held).items():
        answers.checked["template by transformers"] += 1
        try:
            tokenizer.apply_chat_template(
                _GREETING, chat_template=template, tokenize=False, add_generation_prompt=True, tools=None
            )
        except TemplateSyntaxError as error:
            yield f"cannot compile {name} (line {error.lineno}: {one_line(error)})"
        except Exception as error:  # of others than the default one, which may want what is not given here, only syntax
            if name == "default" and type(error) is not TemplateError:
                yield f"cannot render {name} ({one_line(error)})"
