"""Pages from the templates of this room."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import uuid
from html import unescape
from typing import TYPE_CHECKING, Any

from lorasuite.reporting._names import link, number, percent, seconds

if TYPE_CHECKING:
    from jinja2 import Environment


def render_template(template: str, **values: Any) -> str:
    """A template's HTML: text in ``values`` is escaped, and a name that is missing from them is an error."""
    marks = {name: uuid.uuid4().hex for name in _SOURCES}
    page: str = _environment().get_template(template).render(**values, **marks)
    for name, mark in marks.items():
        page = page.replace(mark, _hashes(page, name))
    return page


@functools.cache
def _environment() -> Environment:
    """Of one process, so that each template is compiled once: a fleet writes many reports."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorasuite.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "seconds": seconds, "link": link}
    return environment


#: What a page's policy allows: its own blocks by their hashes, and attributes of the templates and figures by theirs.
_SOURCES = {
    "style_sources": (re.compile(r"<style>(.*?)</style>", re.DOTALL), re.compile(r' style="([^"]*)"')),
    "script_sources": (re.compile(r"<script>(.*?)</script>", re.DOTALL),),
}


def _hashes(page: str, name: str) -> str:
    """Sources of a content security policy: the hash of each block of a page. Text in it is escaped, and is none."""
    blocks, *attributes = (pattern.findall(page) for pattern in _SOURCES[name])
    sources = [f"'sha256-{_digest(text)}'" for text in dict.fromkeys(blocks)]
    for texts in attributes:
        if texts:
            sources += ["'unsafe-hashes'", *(f"'sha256-{_digest(unescape(text))}'" for text in dict.fromkeys(texts))]
    return " ".join(sources) or "'none'"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
