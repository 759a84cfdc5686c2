"""A record as people have it → ids, a text, or a chat in the one form that templates take.

Key idea: a chat template is written for messages of `role` and `content`, tools as JSON schemas and the arguments of a
call as an object. Every other form that is in use is brought into that one, as vLLM does before it renders; what
cannot be is refused with a sentence that says how to convert it: a template drops without a word what it does not know.

Reference: OpenAI's messages (arguments as a JSON string, parts of content); ShareGPT's `conversations`; Alpaca's
`instruction`, `input`, `output`; TRL's `prompt` and `completion`, and `chosen` alone; Dolly's `context`; OpenOrca's
`system_prompt`, `question`, `response`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from mimoquant.errors import CheckpointError

FORMS = "input_ids, messages, conversations, text, prompt and completion, instruction and output, question and answer"
_PAIRS = (  # what is asked, what may answer it; the first as one text, the others as two turns
    ("prompt", ("completion", "response", "chosen")),
    ("instruction", ("output", "response", "completion")),
    ("question", ("answer", "response")),
    ("query", ("response", "answer")),
    ("input", ("output",)),
    ("inputs", ("targets",)),
)
_BESIDE = ("input", "context")  # what a question is about: Alpaca's name, Dolly's
_SYSTEM = ("system", "system_prompt")
_COLUMNS = ("input_ids", "messages", "conversations", "conversation", "text")
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
NO_PLACE_NEEDED = f"tools tool_calls {' '.join(_THOUGHTS)}"  # a template's end that drops what it has no place for
_KINDS = {type(None): "null", bool: "a truth value", int: "a whole number", float: "a number", str: "a text"}
_KINDS |= {list: "a list", dict: "an object"}
_NAMES = ("system", "developer", "user", "assistant", "tool")
_LONGEST_NAME = 40  # of a column, that is shown whole
_IMAGE_KEYS, _AUDIO_KEYS = ("image_url", "image", "url", "path"), ("audio_url", "audio", "url", "path")
_MEDIA = {  # type of a part: what it is, and the keys that its address may have, OpenAI's first
    **dict.fromkeys(("image_url", "image", "input_image"), ("image", _IMAGE_KEYS)),
    **dict.fromkeys(("audio_url", "audio"), ("audio", _AUDIO_KEYS)),
    "input_audio": ("audio", ("input_audio",)),
}
_OLD_MARKS = ("<image>", "<audio>")  # in a text, for what a column of its own holds
_TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's two interfaces
_PARTS_LOOP = re.compile(r"""for\s+\w+\s+in\s+\w+(\.content|\[['"]content['"]\]|\.get\(['"]content['"])""")
Turn: TypeAlias = "dict[str, Any]"


class Address(NamedTuple):
    """Where an image or a sound is, `kind` "image" or "audio": a path or a data URL."""

    kind: str
    target: str


@dataclass(frozen=True)
class Chat:
    """What a template is given. `has_strings`: arguments of calls came as JSON in a string, and are objects here.

    Parts of content that are media have a `type` of "image" or "audio" and an `address`, which no template sees.
    """

    messages: list[Turn]
    tools: Any = None
    has_strings: bool = False

    @property
    def text(self) -> str:
        """Its words. A system's are left out, which whole collections share, unless nobody else speaks."""
        spoken = [turn for turn in self.messages if turn["role"] not in ("system", "developer")] or self.messages
        return "\n".join(_plain(turn.get("content")) for turn in spoken)

    @property
    def media(self) -> list[Address]:
        """In the order in which they stand."""
        contents = (turn.get("content") for turn in self.messages)
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return [part["address"] for part in parts if _is_medium(part)]

    def for_template(self, template: str, where: str) -> Chat:
        """With parts of content joined where the template does not go through them, and "developer" as "system" where
        it does not know that. Raises CheckpointError: it has no place for tools or calls."""
        called = any("tool_calls" in turn for turn in self.messages)
        thoughts = {name: any(turn.get(name) for turn in self.messages) for name in _THOUGHTS}
        for name, held in {"tools": self.tools, "tool_calls": called, **thoughts}.items():
            if held and not re.search(rf"\b{name}\b", template):
                raise CheckpointError(
                    f"{where} has {name}, and the chat template has no place for them",
                    hint=f'write them into the text of a message, or leave {name} out; "plain": true drops them',
                )
        parts_stay = bool(self.media)  # a template that has no place for them writes no placeholder, which is told
        return replace(self, messages=[_fitted(turn, template, parts_stay) for turn in self.messages])

    def with_strings(self) -> Chat:
        """With arguments as they came: for a template that writes them out as text."""
        turns = []
        for turn in self.messages:
            calls = [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in turn.get("tool_calls", ())
            ]
            turns.append(turn | {"tool_calls": calls} if calls else turn)
        return replace(self, messages=turns, has_strings=False)

    def paragraphs(self) -> str:
        """Without a template."""
        return "\n\n".join(f"{turn['role'].capitalize()}: {_plain(turn.get('content'))}" for turn in self.messages)


def content_of(fields: dict[str, Any], where: str, column: str | None) -> list[int] | str | Chat:
    """What a record holds, in the first form that it has; `column`: only that is looked at.

    Raises CheckpointError: none of the forms, null, or a form that is broken.
    """
    if column is not None:
        if column not in fields:
            raise CheckpointError(f"{where} has no column {column!r}; it has {_named(fields)}")
        found = column
    else:
        held = [name for name in _COLUMNS if fields.get(name) is not None]
        if not held:
            return _pair(fields, where)
        found = held[0]
    value = fields[found]
    if value is None:
        raise CheckpointError(f"{where} has null as its {found}", hint="leave the row out, or fill it")
    if found in ("messages", "conversations", "conversation") or is_chat(value):
        return _chat(_unpacked(value), fields, where, found)
    if found == "input_ids" or isinstance(value, list):
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise CheckpointError(
                f"{where} has {found} that {'is' if found == 'text' else 'are'} not a list of integers",
                hint=None if found == "input_ids" else "a list of texts is joined to one, or written as rows, first",
            )
        return value
    return _string(value, where, found)


def _pair(fields: dict[str, Any], where: str) -> str | Chat:
    """A prompt and its answer: chats as a chat, Alpaca's as two turns, two texts as one."""
    for asked, answers in _PAIRS:
        answer = next((name for name in answers if name in fields), None)
        if asked not in fields or answer is None:
            continue
        for name in (asked, answer):
            if fields[name] is None:
                raise CheckpointError(f"{where} has null as its {name}", hint="leave the row out, or fill it")
        first, last = _unpacked(fields[asked]), _unpacked(fields[answer])
        if is_chat(last):
            before = first if is_chat(first) else [{"role": "user", "content": first}]
            return _chat(before + last[len(before) if last[: len(before)] == before else 0 :], fields, where, asked)
        if asked == "prompt" and not is_chat(first):
            return _string(first, where, asked) + _string(last, where, answer)
        if is_chat(first):
            return _chat([*first, {"role": "assistant", "content": last}], fields, where, asked)
        beside = [_string(fields.get(name) or "", where, name) for name in _BESIDE if name != asked]
        question = "\n\n".join(filter(None, (_string(first, where, asked), *beside)))
        said = [*_history(fields.get("history"), where), (question, last)]
        return _chat([turn for pair in said for turn in _asked(*pair)], fields, where, asked)
    if is_chat(chosen := _unpacked(fields.get("chosen"))):  # what was preferred, with what it answers
        return _chat(chosen, fields, where, "chosen")
    empty = [name for name in (*_COLUMNS, "prompt", "instruction") if name in fields]
    if empty and all(fields[name] is None for name in empty):
        raise CheckpointError(f"{where} has null as its {empty[0]}", hint="leave the row out, or fill it")
    raise CheckpointError(
        f"{where} has none of {FORMS}; it has {_named(fields)}", hint="name the column of the text with --data-column"
    )


def _history(pairs: Any, where: str) -> list[tuple[Any, Any]]:
    """What was asked and answered before, as some of Alpaca's kind keep it: a list of pairs."""
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise CheckpointError(
            f"{where} has a history that is not a list of pairs", hint="write it as messages, or leave it out"
        )
    return [(asked, answered) for asked, answered in pairs]


def _asked(question: Any, answer: Any) -> list[Turn]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _named(fields: dict[str, Any]) -> str:
    """The names that a record has. A text of some length is none: so do the columns read of a table without a head."""
    names = [str(name) for name in fields]
    shown = ", ".join(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names[:20])
    return (shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")) or "nothing"


def _string(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{where} has a {name} that is {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    return _KINDS.get(type(value), type(value).__name__)


def is_chat(value: Any) -> bool:
    """Whether a value can be the turns of a chat."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _unpacked(value: Any) -> Any:
    """A list that a table keeps as JSON in a string."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# --- chats ------------------------------------------------------------------------------------------------------------


def _chat(turns: Any, fields: dict[str, Any], where: str, name: str) -> Chat:
    if turns == []:
        raise CheckpointError(f"{where} has no turns in its {name}", hint="leave the row out")
    if not is_chat(turns) or not all(isinstance(turn.get("role", turn.get("from")), str) for turn in turns):
        raise CheckpointError(f"{where} has {name} that are not a list of turns with a role")
    made = [_turn(turn, where) for turn in turns]
    _refuse_column(fields, made, where)
    system = next((fields[name] for name in _SYSTEM if fields.get(name)), None)
    if isinstance(system, str) and system and made[0][0]["role"] != "system":
        made.insert(0, ({"role": "system", "content": system}, False))
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, f"{where} has tools that are not JSON") if tools.strip() else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise CheckpointError(f"{where} has tools that are not a list of JSON schemas")
    return Chat([turn for turn, _ in made], tools or None, any(strings for _, strings in made))


def _refuse_column(fields: dict[str, Any], turns: list[tuple[Turn, bool]], where: str) -> None:
    """Where a text has a mark for a medium that another column holds, reading the text alone would leave it out."""
    held = [name for name in ("image", "images", "audio", "audios") if fields.get(name)]
    said = "\n".join(_plain(turn.get("content")) for turn, _ in turns if not isinstance(turn.get("content"), dict))
    if held and any(mark in said for mark in _OLD_MARKS):
        raise CheckpointError(
            f"{where} has media in a column of their own, {held[0]}, and marks for them in its text",
            hint='write each as a part of its message\'s content: {"type": "image", "image": "pictures/one.png"}',
        )


def _turn(turn: Turn, where: str) -> tuple[Turn, bool]:
    """(the turn as templates take it, whether arguments came as a string)."""
    said = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
    kind = str(turn.get("role", turn.get("from"))).strip()
    said["role"] = _ROLES.get(kind.lower(), kind.lower() if kind.lower() in _NAMES else kind)
    if "from" in turn and said["role"] not in _NAMES:
        raise CheckpointError(
            f"{where} has a turn from {kind!r}; known are {', '.join((*_NAMES, *_ROLES))}",
            hint="write the conversation as messages with role and content",
        )
    if turn.get("value") is not None and "content" not in said:
        said["content"] = turn["value"]
    content = said.get("content")
    if kind == "function_call" and isinstance(content, str):
        call = _json(content, f"{where} has a function_call that is not JSON")
        said["tool_calls"] = call if isinstance(call, list) else [call]
        del said["content"]
    elif isinstance(said.get("function_call"), dict):  # OpenAI's form before tool_calls
        said["tool_calls"] = [{"type": "function", "function": said.pop("function_call")}]
    if isinstance(content, list):
        said["content"] = [_part(part, where) for part in content]
    if "content" in said and not isinstance(said["content"], str | list):
        raise CheckpointError(f"{where} has a content that is {kind_of(content)}")
    calls = said.pop("tool_calls", None) or []
    if calls:
        made = [_call(call, where) for call in calls]
        said["tool_calls"] = [call for call, _ in made]
        return said, any(strings for _, strings in made)
    if "content" not in said and not any(said.get(name) for name in _THOUGHTS):
        raise CheckpointError(
            f"{where} has a turn of {said['role']} without content", hint="leave the row out, or fill it"
        )
    return said, False


def _part(part: Any, where: str) -> Any:
    """A text as it is; a medium as its kind and its address."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    if kind is None:
        kind = next((name for name in _MEDIA if part.get(name) is not None), "text")
    if kind in _MEDIA:
        return _medium(part, str(kind), where)
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise CheckpointError(
            f"{where} has a part of content of type {kind}; only text, images and sound can be read",
            hint='leave such parts out, or write what they show as {"type": "text", "text": ...}',
        )
    return {"type": "text", "text": part["text"]}


def _medium(part: Turn, kind: str, where: str) -> Turn:
    shown, keys = _MEDIA[kind]
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(value, dict) and isinstance(value.get("data"), str):
        value = f"data:;base64,{value['data']}"
    elif isinstance(value, dict):
        value = next((value[key] for key in ("url", "path") if value.get(key) is not None), value)
    if not isinstance(value, str):
        found = "nothing" if value is None else kind_of(value)
        raise CheckpointError(
            f"{where} has a part of type {kind} with {found} for an address; expected is a path or a data URL",
            hint='write {"type": "image", "image": "pictures/one.png"}, or {"type": "audio", "audio": "one.codes.npy"}',
        )
    return {"type": shown, "address": Address(shown, value)}


def _is_medium(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("address"), Address)


def _call(call: Any, where: str) -> tuple[Turn, bool]:
    """A call of a function, its arguments an object: OpenAI's API has them as JSON in a string."""
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        call = {"type": "function", "function": call}
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise CheckpointError(f"{where} has a tool call without a function")
    given = call["function"].get("arguments")
    was_string = isinstance(given, str)
    arguments = _json(given, f"{where} has a tool call whose arguments are not JSON") if given and was_string else given
    kept = {key: value for key, value in call.items() if value is not None}
    return kept | {"function": call["function"] | {"arguments": arguments or {}}}, was_string


def _json(text: str, problem: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{problem}: {text[:60]!r}", hint="write it as a JSON object") from error


def _fitted(turn: Turn, template: str, parts_stay: bool) -> Turn:
    out = dict(turn)
    if isinstance(turn.get("content"), list) and not parts_stay and not _PARTS_LOOP.search(template):
        out["content"] = _plain(turn["content"])
    elif isinstance(turn.get("content"), list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in turn["content"]]
        out["content"] = [{"type": part["type"]} if _is_medium(part) else part for part in parts]
    if turn["role"] == "developer" and "developer" not in template:
        out["role"] = "system"
    return out


def _plain(content: Any) -> str:
    """Content as one text; parts are joined by a line's end, as vLLM joins them. Media have none."""
    if isinstance(content, list):
        texts = (part for part in content if not _is_medium(part))
        return "\n".join(part if isinstance(part, str) else part["text"] for part in texts)
    return content or ""
