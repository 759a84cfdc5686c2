"""YAML of strangers: read without aliases, deep nesting or keys that appear twice."""

from __future__ import annotations

from typing import Any

import yaml

from mimoquant.errors import RecipeError

MAX_DEPTH = 50  # of nesting


def read_yaml(text: str, name: str) -> Any:
    """The document of the recipe `name`. Raises RecipeError where it cannot be read, or only in a way that hides."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError) as error:
        # the last three come from PyYAML's own constructors, on tags such as !!bool maybe
        raise RecipeError(f"recipe {name}: is not readable YAML ({' '.join(str(error).split())[:200]})") from error


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
