"""``python -m paged_infer.cli``."""

from paged_infer.cli import app

if __name__ == "__main__":
    app(prog_name="paged-infer")
