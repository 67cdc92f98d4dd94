"""The HTTP server for one ``AsyncLLM``. It needs the extra ``[serve]``; no other part of the package imports it."""
