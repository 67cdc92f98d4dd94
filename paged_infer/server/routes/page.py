"""The page at /: one self-contained file, which may fetch from this server only."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Type a prompt, read its continuation, and watch the pool of KV blocks meanwhile."""
    content, headers = _page()
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The file, and headers that allow the browser to run its script and no other."""
    content = resources.files("paged_infer.server.routes").joinpath("page.html").read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _digest(content, b"script"),
        "style-src": _digest(content, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return content, {
        "Content-Security-Policy": "; ".join(f"{name} {source}" for name, source in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _digest(content: bytes, tag: bytes) -> str:
    inside = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), content, flags=re.DOTALL)
    assert inside is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside[1]).digest()).decode()}'"
