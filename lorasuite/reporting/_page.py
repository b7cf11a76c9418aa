"""Pages from the templates of this room."""

from __future__ import annotations

from typing import Any

from lorasuite.reporting._names import number, percent, seconds


def render_template(template: str, **values: Any) -> str:
    """A template's HTML: text in ``values`` is escaped, and a name that is missing from them is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorasuite.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "seconds": seconds}
    page: str = environment.get_template(template).render(**values)
    return page
