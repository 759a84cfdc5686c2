"""Forms of a record: each becomes what the chat template means; what it has no place for is a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mimoquant import micro_checkpoint
from mimoquant.calibration.conversations import Chat, content_of
from mimoquant.calibration.tokenizer import load_tokenizer
from mimoquant.calibration.tokens import load_tokens
from mimoquant.errors import CheckpointError

USER, ASSISTANT = "Is it raining?", "Not any more."
PLAIN = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"city": "Paris"}}}
CALLS = [{"role": "user", "content": USER}, {"role": "assistant", "tool_calls": [CALL]}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def changed(call: dict[str, Any], **function: Any) -> dict[str, Any]:
    return call | {"function": call["function"] | function}


def same(form: dict[str, Any], messages: list[dict[str, Any]], tools: Any = None) -> None:
    found = content_of(form, "line 1", None)
    assert isinstance(found, Chat) and found.messages == messages and found.tools == tools


CHATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": PLAIN},
    "nulls in turns": {"messages": [turn | {"name": None, "tool_calls": None} for turn in PLAIN]},
    "no calls": {"messages": [turn | {"tool_calls": []} for turn in PLAIN]},
    "JSON in a string": {"messages": json.dumps(PLAIN)},
    "ShareGPT": {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ASSISTANT}]},
    "ShareGPT, other names": {
        "conversations": [{"from": "user", "value": USER}, {"from": "assistant", "value": ASSISTANT}]
    },
    "conversations of roles": {"conversations": PLAIN},
    "conversation": {"conversation": PLAIN, "conversation_id": 3},
    "Alpaca": {"instruction": USER, "input": "", "output": ASSISTANT},
    "Alpaca without input": {"instruction": USER, "output": ASSISTANT},
    "Dolly": {"instruction": USER, "input": None, "response": ASSISTANT, "category": "qa"},
    "prompt and completion as turns": {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
    "prompt as turns, an answer": {"prompt": PLAIN[:1], "completion": ASSISTANT},
    "preferences": {"prompt": USER, "chosen": PLAIN, "rejected": PLAIN[:1]},
    "preferences without a prompt": {"chosen": PLAIN, "rejected": PLAIN[:1], "score_chosen": 8.0},
    "GSM8K": {"question": USER, "answer": ASSISTANT},
    "MetaMathQA": {"query": USER, "response": ASSISTANT, "type": "x"},
    "FLAN": {"inputs": USER, "targets": ASSISTANT, "task": "x"},
    "input and output": {"input": USER, "output": ASSISTANT},
    "Dolly, an empty context": {"instruction": USER, "context": "", "response": ASSISTANT},
}


@pytest.mark.parametrize("form", list(CHATS))
def test_chats(form: str) -> None:
    same(CHATS[form], PLAIN)


CALLED: dict[str, list[dict[str, Any]]] = {
    "object": CALLS,
    "string": [CALLS[0], {"role": "assistant", "tool_calls": [changed(CALL, arguments='{"city": "Paris"}')]}],
    "null content": [
        CALLS[0],
        {"role": "assistant", "content": None, "tool_calls": [changed(CALL, arguments='{"city":"Paris"}')]},
    ],
}


@pytest.mark.parametrize("form", list(CALLED))
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls(form: str, tools: Any) -> None:
    same({"messages": CALLED[form], "tools": tools}, CALLS, TOOLS)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "function_call": {"name": "look", "arguments": '{"city": "Paris"}'}},
        {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"city": "Paris"}}]},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Paris"}}'},
    ],
)
def test_older_calls(turn: dict[str, Any]) -> None:
    same(
        {"conversations": [turn]},
        [{"role": "assistant", "tool_calls": [{"type": "function", "function": CALL["function"]}]}],
    )


def test_roles_and_systems() -> None:
    turns = [{"from": name, "value": "x"} for name in ("system", "human", "gpt", "observation", "tool")]
    names = ["system", "user", "assistant", "tool", "tool"]
    same({"conversations": turns}, [{"role": name, "content": "x"} for name in names])
    same(
        {"conversations": turns[1:3], "system": "s"},
        [{"role": "system", "content": "s"}, *({"role": n, "content": "x"} for n in names[1:3])],
    )
    empty = {"role": "assistant", "tool_calls": [changed(CALL, arguments={})]}
    same({"messages": [{"role": "assistant", "tool_calls": [changed(CALL, arguments="")]}]}, [empty])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": "a"}, "a"),
        ({"text": "a", "messages": None}, "a"),
        ({"text": "a", "instruction": "b", "output": "c"}, "a"),
        ({"prompt": "a ", "completion": "b"}, "a b"),
        ({"prompt": "a ", "response": "b"}, "a b"),
    ],
)
def test_texts(fields: dict[str, Any], text: str) -> None:
    assert content_of(fields, "line 1", None) == text


def test_alpaca_with_an_input() -> None:
    found = content_of({"instruction": "Translate", "input": "chat", "output": "cat"}, "line 1", None)
    assert isinstance(found, Chat) and found.messages[0]["content"] == "Translate\n\nchat"


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Translate", "context": "chat", "response": "cat", "category": "qa"},
        {"question": "Translate", "context": "chat", "answer": "cat"},
        {"instruction": "Translate", "input": None, "context": "chat", "output": "cat"},
        {"query": "Translate", "input": "chat", "response": "cat"},
    ],
)
def test_what_a_question_is_about_is_asked_with_it(record: dict[str, Any]) -> None:
    same(record, [{"role": "user", "content": "Translate\n\nchat"}, {"role": "assistant", "content": "cat"}])


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_in_a_column_of_its_own(name: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    for form in ({"question": USER, "response": ASSISTANT}, {"messages": PLAIN}, {"chosen": PLAIN, "rejected": []}):
        same(form | {name: "Be brief."}, [system, *PLAIN])
        same(form | {name: ""}, PLAIN)


def test_alpaca_with_what_was_said_before() -> None:
    record = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}
    chat = content_of(record, "line 1", None)
    assert isinstance(chat, Chat)
    assert [(turn["role"], turn["content"]) for turn in chat.messages] == [
        *(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    for nothing in (None, []):
        without = content_of(record | {"history": nothing}, "line 1", None)
        assert isinstance(without, Chat) and len(without.messages) == 3


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_of_text_by_any_name(kind: str) -> None:
    chat = content_of({"messages": [{"role": "user", "content": [{"type": kind, "text": "a"}]}]}, "line 1", None)
    assert isinstance(chat, Chat) and chat.messages[0]["content"] == [{"type": "text", "text": "a"}]


def test_a_column_of_any_form() -> None:
    assert content_of({"a": "x", "text": "y"}, "line 1", "a") == "x" and content_of({"a": [1, 2]}, "line 1", "a") == [
        1,
        2,
    ]
    found = content_of({"dialog": PLAIN}, "line 1", "dialog")
    assert isinstance(found, Chat) and found.messages == PLAIN


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
        "a part of content of type video_url; only text",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [changed(CALL, arguments="{city")]}]},
        "a tool call whose arguments are not JSON: '{city'",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "a tool call without a function"),
    ({"messages": PLAIN, "tools": "{"}, "tools that are not JSON"),
    ({"messages": PLAIN, "tools": {"a": 1}}, "tools that are not a list"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "a turn from 'narrator'; known are"),
    ({"conversations": [{"value": "x"}]}, "conversations that are not a list of turns with a role"),
    ({"messages": [{"role": "user", "content": 3}]}, "a content that is a whole number"),
    ({"messages": [{"role": "user", "content": None}, *PLAIN]}, "a turn of user without content"),
    ({"messages": [{"role": "user"}]}, "a turn of user without content"),
    ({"conversations": [{"from": "human", "value": None}, *PLAIN]}, "a turn of user without content"),
    ({"messages": [*PLAIN, {"role": "tool", "content": None}]}, "a turn of tool without content"),
    ({"messages": [{"role": "user", "content": [3]}]}, "a part of content of type a whole number"),
    ({"instruction": "x", "output": "y", "history": ["a", "b"]}, "a history that is not a list of pairs"),
    ({"text": None}, "null as its text"),
    ({"text": None, "messages": None}, "null as its messages"),
    ({"prompt": None, "completion": "x"}, "null as its prompt"),
    ({"instruction": "x", "output": None}, "null as its output"),
    ({"story": "x"}, "none of input_ids, messages"),
]


@pytest.mark.parametrize(("fields", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_what_cannot_be_read(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        content_of(fields, "a.jsonl: line 7", None)
    assert str(caught.value).startswith("a.jsonl: line 7 has ") and problem in str(caught.value)


# --- with a template --------------------------------------------------------------------------------------------------


def micro_with(tmp_path: Path, template: Any) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(micro_checkpoint() / "tokenizer.json", folder)
    config = json.loads((micro_checkpoint() / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def rendered(tmp_path: Path, template: Any, record: dict[str, Any]) -> str:
    """What the model would see of a record."""
    folder = micro_with(tmp_path, template)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps({"input_ids": [0] * 64}) + "\n")
    found = load_tokens([str(path)], folder, sequences=None, tokens=2, vocab=1024)
    text = load_tokenizer(folder).decode(found.ids.ravel().tolist())
    return text.partition("<|endoftext|>")[0]


CALLED_BY = "{% for m in messages %}{{ m.content }}{% for t in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
ITEMS = CALLED_BY.replace("CALL", "{% for k, v in t.function.arguments|items %}<{{ k }}={{ v }}>{% endfor %}")
JSON = CALLED_BY.replace("CALL", "{{ t.function.arguments | tojson }}")
GLUED = CALLED_BY.replace("CALL", "{{ 'args ' + t.function.arguments }}")


@pytest.mark.parametrize("form", ["object", "string"])
@pytest.mark.parametrize(("template", "said"), [(ITEMS, f"{USER}<city=Paris>"), (JSON, USER + '{"city": "Paris"}')])
def test_arguments_are_rendered_as_the_template_means_them(form: str, template: str, said: str, tmp_path: Path) -> None:
    assert rendered(tmp_path, template, {"messages": CALLED[form]}) == said


def test_a_template_that_wants_text_gets_it_where_the_data_has_it(tmp_path: Path) -> None:
    assert rendered(tmp_path, GLUED, {"messages": CALLED["string"]}) == USER + 'args {"city": "Paris"}'


PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "one\ntwo"),
        ("{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}", "one\ntwo!"),
        ("{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}", "[one][two]"),
        ("{% for m in messages %}{% for p in m['content'] %}({{ p['type'] }}){% endfor %}{% endfor %}", "(text)(text)"),
    ],
)
def test_parts_of_content(template: str, said: str, tmp_path: Path) -> None:
    assert rendered(tmp_path, template, PARTS) == said


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ {'b': 'é', 'a': 1} | tojson }}", '{"b": "é", "a": 1}'),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ pad_token is defined }}{{ add_generation_prompt }}", "TrueFalse"),
        ([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}], "plain"),
    ],
)
def test_templates_have_what_transformers_gives_them(template: Any, said: str, tmp_path: Path) -> None:
    assert rendered(tmp_path, template, {"messages": PLAIN}) == said


def test_a_template_for_tools_is_used_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]
    assert rendered(tmp_path, named, {"messages": PLAIN, "tools": TOOLS}) == "look"


def test_templates_of_which_none_is_the_default_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none of its templates is named default: rag, tool_use") as raised:
        rendered(tmp_path, [{"name": name, "template": "x"} for name in ("tool_use", "rag")], {"messages": PLAIN})
    assert "the template's" in str(raised.value.hint)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("named", [False, True], ids=["one template", "two"])
def test_chats_are_rendered_as_a_tokenizer_of_transformers_renders_them(
    named: bool, tools: Any, tmp_path: Path
) -> None:
    template = "{{ eos_token }}{{ unk_token }}{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    held: Any = (
        [{"name": "default", "template": "x"}, {"name": "tool_use", "template": template}] if named else template
    )
    folder = micro_with(tmp_path, held)
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).apply_chat_template(
        PLAIN, tools=tools, tokenize=False
    )
    render = load_tokenizer(folder).render
    assert render is not None and render(PLAIN, tools) == theirs


@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja"])
def test_where_templates_lie(place: str, tmp_path: Path) -> None:
    folder = micro_with(tmp_path, "config")
    text = "from the file"
    (folder / place).write_text(json.dumps({"chat_template": text}) if place.endswith(".json") else text)
    render = load_tokenizer(folder).render
    assert render is not None and render(PLAIN, None) == "from the file"


SIMPLE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("record", "problem", "hint"),
    [
        (
            {"messages": PLAIN, "tools": TOOLS},
            "has tools, and the chat template has no place",
            "write them into the text",
        ),
        ({"messages": CALLS}, "has tool_calls, and the chat template has no place", "leave tool_calls out"),
        *(
            (
                {"messages": [*PLAIN, {"role": "assistant", "content": "x", name: "why"}]},
                f"has {name}, and the chat template has no place",
                f"leave {name} out",
            )
            for name in ("reasoning_content", "reasoning", "thinking")
        ),
        (
            {"messages": [{"role": "system", "content": "x"}, *PLAIN]},
            "System role not supported",
            "before the first user",
        ),
        (
            {"messages": [{"role": "developer", "content": "x"}, *PLAIN]},
            "System role not supported",
            "before the first user",
        ),
    ],
)
def test_a_form_without_a_place_says_how_to_convert_it(record: Any, problem: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        rendered(tmp_path, SIMPLE, record)
    assert "line 1" in str(caught.value) and problem in str(caught.value) and hint in str(caught.value.hint)


def test_plain_records_do_without(tmp_path: Path) -> None:
    assert rendered(tmp_path, SIMPLE, {"messages": PLAIN, "tools": TOOLS, "plain": True}) == USER + ASSISTANT


def test_alpaca_without_a_template(tmp_path: Path) -> None:
    said = rendered(tmp_path, None, {"instruction": USER, "input": "", "output": ASSISTANT})
    assert said == f"User: {USER}\n\nAssistant: {ASSISTANT}"
