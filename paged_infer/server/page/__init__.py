"""The page at /: its markup, style and scripts, and the recordings that it plays."""
