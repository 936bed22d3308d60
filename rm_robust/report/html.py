"""HTML of the report: a page, its sections, and pictures as inline PNG. Titles, sentences and captions are escaped here; `html` is not."""

import base64
import io
from html import escape

from matplotlib.figure import Figure

PAGE_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:74rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:#1f2933;background:#fff}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-top:2px solid #e4e7eb;padding-top:1rem}
h3{font-size:1rem;margin:.2rem 0}p{margin:.4rem 0;max-width:46rem}
.summary{background:#f5f7fa;border:1px solid #cbd2d9;border-radius:.5rem;padding:.6rem 1rem}
.summary dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:.1rem 1.4rem;margin:.4rem 0}
.summary dt{color:#52606d;font-size:.85rem}.summary dd{margin:0 0 .4rem;font-weight:600;overflow-wrap:anywhere}
.absent{color:#7b4a00;background:#fff8e6;border-left:4px solid #e0a800;padding:.4rem .7rem}
.warning{color:#7f1d1d;background:#fdecea;border-left:6px solid #c62828;padding:.5rem .8rem;font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem 2rem;align-items:start}
figure{margin:.6rem 0;max-width:36rem}img{width:100%;height:auto;display:block}
figcaption{font-size:.88rem;color:#3e4c59;margin-top:.3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .7rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e4e7eb}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:12rem;max-width:32rem}
summary{cursor:pointer}code{font-size:.88em}
"""


def page(title: str, body: str) -> str:
    """A whole page, readable on a phone, that loads nothing. `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def section(title: str, *html: str) -> str:
    """A headed part of the page; empty pieces are left out."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(piece for piece in html if piece)


def absent(sentence: str) -> str:
    """A sentence that stands out: what is not there, and why."""
    return f'<p class="absent">{escape(sentence)}</p>'


def warning(sentence: str) -> str:
    """A sentence that nobody overlooks: what went wrong, with its numbers."""
    return f'<p class="warning" role="alert">{escape(sentence)}</p>'


def figure_grid(*html: str) -> str:
    """Pictures side by side where there is room, below each other on a phone."""
    return f'<div class="figures">{"".join(html)}</div>' if html else ""


def picture(title: str, figure: Figure | None, caption: str, reason_absent: str) -> str:
    """The figure as an inline PNG with its caption, or a sentence that says why there is none."""
    if figure is None:
        return f"<div><h3>{escape(title)}</h3>{absent(f'No picture: {reason_absent}.'.replace('..', '.'))}</div>"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    image_tag = f'<img alt="{escape(title)}" src="data:image/png;base64,{image}">'
    return f"<figure><h3>{escape(title)}</h3>{image_tag}<figcaption>{escape(caption)}</figcaption></figure>"
