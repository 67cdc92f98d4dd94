"""``python -m my_engine --chapter 8``: see states.py."""

from .states import main

main()
