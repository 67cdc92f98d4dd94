"""The page at /, one self-contained response that may fetch only from this server, and the recordings it plays."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from paged_infer.server.openai.errors import APIError

FILES = resources.files("paged_infer.server.page")
SCRIPTS = ("replay.js", "pool_map.js", "player.js", "stories.js", "page.js")  # in this order
RECORDINGS = ("eight", "long", "shared", "recompute", "swap")
router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """A page to type a prompt, read its continuation, and watch the pool of KV blocks meanwhile."""
    content, headers = _page()
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


@router.get("/recordings/{name}.json", include_in_schema=False)
async def recording(name: str) -> Response:
    """A recording that the page plays; see ``page.recordings``."""
    if name not in RECORDINGS:
        raise APIError(404, f"recording {name!r}: must be one of {', '.join(RECORDINGS)}")
    return Response(FILES.joinpath("recorded", f"{name}.json").read_bytes(), media_type="application/json")


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    """Markup, style and scripts in one document, and headers that let the browser run these scripts only."""
    style = FILES.joinpath("page.css").read_bytes()
    scripts = [FILES.joinpath(name).read_bytes() for name in SCRIPTS]
    content = FILES.joinpath("page.html").read_bytes()
    content = content.replace(b"<style></style>", b"<style>%b</style>" % style)
    content = content.replace(b"<script></script>", b"".join(b"<script>%b</script>\n" % one for one in scripts))
    policy = {
        "default-src": "'none'",
        "script-src": _digests(content, b"script"),
        "style-src": _digests(content, b"style"),
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


def _digests(content: bytes, tag: bytes) -> str:
    insides = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, flags=re.DOTALL)
    assert insides
    digests = (base64.b64encode(hashlib.sha256(inside).digest()).decode() for inside in insides)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
