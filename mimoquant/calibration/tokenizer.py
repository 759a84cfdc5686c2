"""A checkpoint's tokenizer, read from its own folder: text → ids, and a chat → text.

Key idea: `tokenizer.json` alone says everything that encoding needs, and the package tokenizers reads it in no time;
transformers reads what is older. Which of the two did it is told in `Tokenizer.origin`. Chats are rendered by what
transformers' `apply_chat_template` calls, without a generation prompt, because a template is a program that was written
for its functions. Never the network, never a folder's code, never a pickle.
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

from mimoquant.checkpoint.folders import resolve_inside
from mimoquant.checkpoint.network import stay_offline
from mimoquant.errors import CheckpointError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SMALL, _MORE_TEMPLATES = (".json", ".jinja", ".txt", ".model"), "additional_chat_templates"
_QUIET = {"TRANSFORMERS_VERBOSITY": "error"}  # it warns of every config.json that it has no class for


@dataclass(frozen=True)
class Tokenizer:
    """`render` turns (messages, tools) into text, by transformers, which it loads when it is first called; it is None
    where there is no chat template."""

    origin: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    render: Callable[[list[Any], Any], str] | None
    eos: int | None
    template: str = ""  # the source of what `render` renders


def go_offline() -> None:
    """Hugging Face's libraries read these once, when first imported; every path we give them is a local folder too."""
    stay_offline()
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
    _refuse_links(folder)
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


def tokenizer_of_transformers(folder: Path) -> Any:
    """As AutoTokenizer builds it of the folder's files. Raises what transformers raises, and CheckpointError for a file
    that is a link elsewhere."""
    go_offline()
    _refuse_links(folder)
    transformers = importlib.import_module("transformers")
    with _silent():
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _refuse_links(folder: Path) -> None:
    """Raises CheckpointError where a small file that a tokenizer may be made of leads out of the folder: the libraries
    open them by themselves."""
    for place in (folder, folder / _MORE_TEMPLATES):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix in _SMALL and not path.is_dir():
                resolve_inside(folder, path.relative_to(folder).as_posix())


def _auto_tokenizer(folder: Path) -> Tokenizer:
    transformers, tokenizer = importlib.import_module("transformers"), tokenizer_of_transformers(folder)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def render(messages: list[Any], tools: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=False))

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    held = tokenizer.chat_template or ""
    template = "\n".join(held.values()) if isinstance(held, dict) else held
    origin = f"{type(tokenizer).__name__} of transformers {transformers.__version__}"
    return Tokenizer(origin, encode, decode, render if template else None, tokenizer.eos_token_id, template)


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
    tokenizer = tokenizers.Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())  # whose path may be no UTF-8
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    special = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key in _SPECIAL and value
    }
    templates = _templates(folder, config)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    eos = tokenizer.token_to_id(special["eos_token"]) if special.get("eos_token") else None
    render = _renderer(templates, special) if templates else None
    origin = f"tokenizer.json, read by tokenizers {tokenizers.__version__}"
    return Tokenizer(origin, encode, decode, render, eos, "\n".join(templates.values()))


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The folder's chat templates by name; the one that is used by default is "default"."""
    held = config.get("chat_template") or {}
    if isinstance(held, list):
        held = {item["name"]: item["template"] for item in held}
    found = {"default": held} if isinstance(held, str) else dict(held)
    older, file = folder / "chat_template.json", folder / "chat_template.jinja"
    if older.is_file():
        found["default"] = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    for named in sorted((folder / _MORE_TEMPLATES).glob("*.jinja")):
        found[named.stem] = named.read_text(encoding="utf-8")
    return found


def _renderer(templates: dict[str, str], special: dict[str, str]) -> Callable[[list[Any], Any], str]:
    """Renders chats by what transformers' tokenizers render them by, which loads in half the time of a tokenizer."""

    def render(messages: list[Any], tools: Any) -> str:
        go_offline()
        rendering = importlib.import_module("transformers.utils.chat_template_utils")
        name = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if name not in templates:
            raise LookupError(f"none of its templates is named default: {', '.join(sorted(templates))}")
        chats, _ = rendering.render_jinja_template([messages], tools, chat_template=templates[name], **special)
        return str(chats[0])

    return render


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
