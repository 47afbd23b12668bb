"""HTML pages from the Jinja templates in `templates/`; whatever is put into them is escaped."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(name: str, **values: Any) -> str:
    """The text of a template.

    Args:
        name: file in `regraft/report/templates`, such as `compare.html.j2`.
        values: what the template names; a name that it needs and does not get is an error.
    """
    return template_environment().get_template(name).render(**values)


@cache
def template_environment() -> Environment:
    """The loader of templates, with the filter `svg_uri` for pictures inside a page."""
    environment = Environment(
        loader=PackageLoader("regraft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg_uri"] = svg_uri
    return environment


def svg_uri(svg: bytes) -> str:
    """An SVG as the address of an image, so that the page needs no other file."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
