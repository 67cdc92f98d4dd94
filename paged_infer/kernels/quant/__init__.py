"""Linear layers with weights of few bits."""
