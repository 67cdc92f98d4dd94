"""Writes every diagram; with ``--check``, only names those that are not stored as they are drawn now."""

from __future__ import annotations

import sys

from . import DRAWINGS, stored

if __name__ == "__main__":
    drawn = {stored(name): draw().svg() for name, draw in DRAWINGS.items()}
    stale = [path for path, svg in drawn.items() if not path.is_file() or path.read_text("utf-8") != svg]
    if "--check" in sys.argv[1:]:
        sys.exit(f"not as drawn now: {', '.join(path.name for path in stale)}" if stale else 0)
    for path in stale:
        path.write_text(drawn[path], encoding="utf-8")
        print(path.name)
