import numpy as _numpy  # noqa: F401  before torch, which drops a KeyboardInterrupt of this import, and goes on without
