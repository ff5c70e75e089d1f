"""What all pages share: the templates' environment, and the text of a hash."""

import json
from pathlib import Path

import jinja2

from analysis import numbers, units

TEMPLATES = Path(__file__).parents[1]


def write_page(template: str, *, path: Path, **content) -> Path:
    """Fill a template of analysis/ (everything is escaped) and write it to `path`, whose folder is made."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    show = {"percent": numbers.percent, "points": numbers.points, "seconds": numbers.seconds, "size": numbers.size}
    environment.filters |= show | {"sha": short, "level": units.level, "named": units.named}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(**content), encoding="utf-8")
    return path


def short(digest) -> str:
    """The first 12 digits of a hash, or of several as JSON."""
    if digest is None:
        return "–"
    return digest[:12] if isinstance(digest, str) else short(json.dumps(digest, sort_keys=True))
