"""How good is a model, and is its difference from another one more than chance? ``paged-infer eval``; see README.md."""
