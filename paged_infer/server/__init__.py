"""The HTTP server, over one ``AsyncLLM``. It needs the extra ``[serve]``; nothing else of the package imports it.

protocol   what a body may hold          answers   outputs -> OpenAI's JSON       door      host, key, size, shutdown
completions, chat, jobs, status          the routes, one APIRouter each           metrics   Prometheus
page, watch                              the page at /, and what it watches
service    the engine behind them        app       all of it put together         run       uvicorn, and a clean end
"""
