"""The two pages for people: page.html at `/`, and docs.html at `/docs`.

The first is for pasting, scoring and comparing; the second shows what openapi.json says. Each page is one static file
without any secret. So it may be sent, with status 401, to a browser that has no key yet; it then asks for the key and
sends it with its own requests. Its Content-Security-Policy admits the file's own style and script by their hash, and
requests to this server.
"""

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import Literal, get_args

from starlette.responses import Response

PageName = Literal["page", "docs"]
PAGES: dict[str, PageName] = {"/": "page", "/docs": "docs"}
"""The page at each path."""


def content_security_policy(html: str) -> str:
    """Return the policy that lets a page use its own inline style and script, and ask this server."""
    own_blocks = []
    for tag in ("style", "script"):
        block = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert block is not None, f"the page has no inline <{tag}>"
        own_blocks.append(f"{tag}-src 'sha256-{b64encode(sha256(block[1].encode()).digest()).decode()}'")
    return "; ".join(
        [
            "default-src 'none'",
            *own_blocks,
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ],
    )


HTML = {name: files("serve.http").joinpath(f"{name}.html").read_text(encoding="utf-8") for name in get_args(PageName)}
POLICIES = {name: content_security_policy(html) for name, html in HTML.items()}


def page_response(name: PageName, *, status: int) -> Response:
    """Return the page, with status 200, or with 401 for a browser that must ask its user for a key."""
    headers = {
        "Content-Security-Policy": POLICIES[name],
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(HTML[name], status_code=status, headers=headers, media_type="text/html; charset=utf-8")
