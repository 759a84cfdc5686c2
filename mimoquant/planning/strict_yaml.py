"""YAML of strangers: read without aliases, deep nesting, keys that appear twice, or objects of Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from mimoquant.errors import RecipeError

MAX_DEPTH = 50  # of nesting
_PLAIN = "tag:yaml.org,2002:"
_PYTHON = f"{_PLAIN}python/"


def read_yaml(text: str, name: str) -> Any:
    """The document of the recipe `name`. Raises RecipeError where it cannot be read, or only in a way that hides."""
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        for where, key, tag in _tagged(node, ()):
            raise RecipeError(
                f"recipe {name}: {where} is an object of {tag}, which is never made from a recipe",
                hint=f"delete {key} and what stands under it" if key else "a recipe is a mapping of stages",
            )
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError) as error:
        # the last three come from PyYAML's own constructors, on tags such as !!bool maybe
        raise RecipeError(f"recipe {name}: is not readable YAML ({' '.join(str(error).split())[:200]})") from error


def _tagged(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Nodes that ask for more than plain values: where they stand, the innermost key there, their tag as written."""
    if node is None:
        return
    if not node.tag.startswith(_PLAIN) or node.tag.startswith(_PYTHON):
        keys = [part for part in path if not part.startswith("[")]
        where = ".".join(path).replace(".[", "[") or "the document"
        yield where, keys[-1] if keys else "", node.tag.replace(_PLAIN, "!!", 1)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _tagged(key, path)
            yield from _tagged(value, (*path, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _tagged(value, (*path, f"[{number}]"))


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases and deep nesting (only bombs need them) and repeated keys (the first would be
    lost)."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a recipe")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else None
            if name in seen:
                raise yaml.YAMLError(f"the key {name!r} appears twice")
            seen.add(name)
        return super().construct_mapping(node, deep)
