"""Numbers on a page that say which field of the JSON beside it they come from."""

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from eval import claims, wording

# how a number is written; the name stands in the page, so that whoever checks it can write it again
RULES: dict[str, Callable[[Any], str]] = {
    "number": wording.number,
    "number3": lambda value: wording.number(value, 3),
    "number2": lambda value: wording.number(value, 2),
    "percent": wording.percent,
    "duration": wording.duration,
    "size": wording.size,
    "upward": claims.upward,
}


class Quoted:
    """Writes values of a JSON tree as ``<data>`` elements with the path of the value and the rule that made the text."""

    def __init__(self, tree: Any):
        self.tree = tree

    def __call__(self, path: str, rule: str = "number", missing: str = "not measured") -> str:
        """The value at ``path``, or ``missing`` where there is none."""
        value = lookup(self.tree, path)
        if value is None:
            return missing
        return Markup('<data value="{}" data-path="{}" data-rule="{}">{}</data>').format(
            value, path, rule, RULES[rule](value)
        )

    def value(self, path: str) -> Any:
        """The bare value at ``path``, or None."""
        return lookup(self.tree, path)


def lookup(tree: Any, path: str) -> Any:
    """The value at a dotted path, or None where there is none. Keys may hold dots themselves: the longest one wins."""
    if not path:
        return tree
    if isinstance(tree, list):
        index, _, rest = path.partition(".")
        return lookup(tree[int(index)], rest) if index.isdigit() and int(index) < len(tree) else None
    if not isinstance(tree, dict):
        return None
    keys = [key for key in tree if path == key or path.startswith(f"{key}.")]
    return lookup(tree[max(keys, key=len)], path[len(max(keys, key=len)) + 1 :]) if keys else None
