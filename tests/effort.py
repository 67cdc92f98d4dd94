"""How much the slow property tests try: EFFORT times as much as in ``make test``; ``make nightly`` sets it to 5."""

import os

EFFORT = int(os.environ.get("EFFORT", "1"))
