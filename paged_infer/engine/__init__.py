import numpy as _numpy  # noqa: F401  before torch, which swallows a KeyboardInterrupt in this import
