"""docs/settings.md, generated from the Settings class: `python -m service settings > docs/settings.md`."""

from service.settings import Settings, variables

HEAD = """\
# Settings

Each process of the service reads its settings from environment variables when it starts. It refuses to start with a
value that is not allowed, and warns of a `LABELGRID_` variable that is no setting. `python -m service settings`
writes this page.

| variable | default, allowed | meaning |
| --- | --- | --- |
"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _default(name: str) -> str:
    default = Settings.model_fields[name].get_default(call_default_factory=True)
    return "" if default in (None, "") else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _allowed(name: str) -> str:
    schema = Settings.model_json_schema(by_alias=False)["properties"][name]
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    if choices := [f"`{choice}`" for part in parts for choice in part.get("enum", [])]:
        return ", ".join(choices)
    return ", ".join(f"{sign} {part[bound]}" for part in parts for bound, sign in BOUNDS.items() if bound in part)


def document() -> str:
    """Return the text of docs/settings.md."""
    rows = []
    for name, field in Settings.model_fields.items():
        names = " or ".join(f"`{variable}`" for variable in variables(name))
        meaning = " ".join((field.description or "").split())
        values = "; ".join(filter(None, (_default(name), _allowed(name))))
        rows.append(f"| {names} | {values} | {meaning} |\n")
    return HEAD + "".join(rows)
