# CHAPTER 01
"""The engine that the course builds; ``python -m my_engine --chapter 8`` shows a state of it."""

from .sampler import SamplingParams
from .decoder import Decoder  # NEW 03
from .generate import generate_naive  # NEW 03
from .generate import generate_cached  # NEW 04
from .engine import Engine  # NEW 08
