"""What the tests of the page do in a browser."""

from __future__ import annotations

import re
from typing import Any

from serving import Served

AS_IT_HAPPENS = "Infinity"


def opened(page: Any, served: Served, speed: str = AS_IT_HAPPENS) -> None:
    page.goto(served.url)
    page.get_by_text(re.compile(r"^0 of .* blocks")).wait_for()
    page.get_by_label("Speed").select_option(speed)


def set_option(page: Any, label: str, value: str) -> None:
    page.locator("form details").evaluate("one => { one.open = true; }")
    page.get_by_label(label).fill(value)
