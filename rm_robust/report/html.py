"""HTML pages from the jinja2 templates beside the code, and pictures as inline PNG.

Autoescape is on: a template escapes every value that it shows.
"""

import base64
import io

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

_TEMPLATES = Environment(
    loader=PackageLoader("rm_robust", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: object) -> str:
    """Return the page that a template makes of the values. `template` is its path below rm_robust/."""
    return _TEMPLATES.get_template(template).render(values)


def inline_png(figure: Figure | None) -> str | None:
    """Return the figure's PNG in base64, for a data URL; None when there is no figure."""
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
