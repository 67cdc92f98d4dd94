"""How good is a model, and is the difference to another one more than chance? ``paged-infer eval``; see README.md."""
