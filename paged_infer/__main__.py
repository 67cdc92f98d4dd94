"""``python -m paged_infer``: the command line, where ``paged-infer`` is not on the path."""

from paged_infer.cli import app

if __name__ == "__main__":
    app(prog_name="paged-infer")
