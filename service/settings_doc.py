"""`python -m service.settings_doc > docs/settings.md`: the list of settings, made from the Settings class.

A setting's meaning is the comment above its field.
"""

import inspect
import re
import sys

from pydantic_core import PydanticUndefined

from service.settings import Settings, variables

HEAD = """\
# Settings

Made by `python -m service.settings_doc > docs/settings.md` from `service/settings.py`; a test keeps both equal. API and
workers read them from the environment when they start; a value that is not allowed stops the start with a message.

| variable | default | allowed | what it is |
| --- | --- | --- | --- |
"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def comments() -> dict[str, str]:
    """The comment above each field, as one line."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(Settings).splitlines():
        if match := re.fullmatch(r"    # (.*)", line):
            above.append(match[1])
            continue
        if match := re.match(r"    (\w+): ", line):
            found[match[1]] = " ".join(above)
        above = []
    return found


def _default(name: str) -> str:
    default = Settings.model_fields[name].get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "none: it must be given"
    return "" if default in (None, "") else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _allowed(name: str) -> str:
    schema = Settings.model_json_schema(by_alias=False)["properties"][name]
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    if choices := [f"`{choice}`" for part in parts for choice in part.get("enum", [])]:
        return ", ".join(choices)
    if any(part.get("type") == "boolean" for part in parts):
        return "`true`, `false`"
    return ", ".join(f"{sign} {part[bound]}" for part in parts for bound, sign in BOUNDS.items() if bound in part)


def document() -> str:
    """The whole of docs/settings.md."""
    meanings = comments()
    rows = []
    for name in Settings.model_fields:
        names = " or ".join(f"`{variable}`" for variable in variables(name))
        rows.append(f"| {names} | {_default(name)} | {_allowed(name)} | {meanings[name]} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(document())
