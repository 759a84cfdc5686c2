"""A checkpoint's tokenizer, read from its own folder: text → ids, and a chat → text.

Key idea: transformers reads what a user's serving engine will read; where it cannot (it is not installed, or the folder
asks for code of its own), `tokenizer.json` alone says everything that encoding needs. Which of the two did it is told
in `Tokenizer.origin`. Never the network, never a folder's code, never a pickle.

Reference: chat templates are rendered as transformers' `apply_chat_template` does, without a generation prompt.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimoquant.errors import CheckpointError

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_QUIET = {"TRANSFORMERS_VERBOSITY": "error"}  # it warns of every config.json that it has no class for


@dataclass(frozen=True)
class Tokenizer:
    """`render` turns (messages, tools) into text and is None where there is no chat template."""

    origin: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    render: Callable[[list[Any], Any], str] | None
    eos: int | None


def go_offline() -> None:
    """Hugging Face's libraries read these once, when first imported; every path we give them is a local folder too."""
    os.environ.update(_OFFLINE)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def decoder_of(folder: Path) -> Callable[[list[int]], str] | None:
    """Ids to text; None where the folder has no tokenizer that can be read: ids themselves are shown then."""
    try:
        return load_tokenizer(folder).decode
    except CheckpointError:
        return None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises CheckpointError: the folder has no tokenizer, or none of the two libraries can read it."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(
            f"{folder}: has no tokenizer (none of {', '.join(_VOCABULARIES)})",
            hint="copy the tokenizer's files beside the weights, or give data that is a .npy array of ids",
        )
    go_offline()
    problems: list[str] = []
    for package, read in (("tokenizers", _plain_tokenizer), ("transformers", _auto_tokenizer)):
        try:
            return read(folder)
        except Exception as error:  # the second is the fallback of the first
            problems.append(f"{package}: {one_line(error)}")
    raise CheckpointError(
        f"{folder}: its tokenizer cannot be read ({'; '.join(problems)})",
        hint="pip install transformers, or tokenizers if there is a tokenizer.json",
    )


def _auto_tokenizer(folder: Path) -> Tokenizer:
    transformers = importlib.import_module("transformers")
    with _silent():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def render(messages: list[Any], tools: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=False))

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    has_template = bool(tokenizer.chat_template)
    origin = f"{type(tokenizer).__name__} of transformers {transformers.__version__}"
    return Tokenizer(origin, encode, decode, render if has_template else None, tokenizer.eos_token_id)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep stdout for data: tokenizers prints there, from outside of Python, the names of settings it does not know,
    which a hostile file chooses."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _plain_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json` alone; special tokens and chat template from the files beside it."""
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    special = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key in ("bos_token", "eos_token", "pad_token")
    }
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several templates by name
        template = next((item["template"] for item in template if item["name"] == "default"), None)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    eos = tokenizer.token_to_id(special["eos_token"]) if special.get("eos_token") else None
    render = _chat_template(template, special) if template else None
    return Tokenizer(f"tokenizer.json, read by tokenizers {tokenizers.__version__}", encode, decode, render, eos)


def _chat_template(template: str, special_tokens: dict[str, str]) -> Callable[[list[Any], Any], str]:
    """A chat template in Jinja's sandbox, with the settings and functions that transformers gives it."""
    jinja2 = importlib.import_module("jinja2")
    sandbox = importlib.import_module("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    sandbox.globals["raise_exception"] = refuse
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    compiled = sandbox.from_string(template)

    def render(messages: list[Any], tools: Any) -> str:
        return str(compiled.render(messages=messages, tools=tools, add_generation_prompt=False, **special_tokens))

    return render


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
