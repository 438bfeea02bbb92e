"""The templates of the HTML pages, set up once for all of them."""

import functools
import json
from pathlib import Path

import jinja2

from eval import wording

TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> jinja2.Template:
    """A file of ``templates/``: whatever is filled in is escaped, and a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "percent": wording.percent,
        "duration": wording.duration,
        "size": wording.size,
        "fixed": wording.fixed,
        "json": functools.partial(json.dumps, ensure_ascii=False),
    }
    return environment.get_template(name)
