"""In JupyterLab, in a headless Chromium: open a notebook, run all, move a slider, and the picture changes.

Skipped where playwright or a Chromium is missing. Any Chromium or Chrome will do, from the system's packages (Debian,
Ubuntu: ``apt install chromium``); one with another name is found by the environment variable CHROMIUM.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from holding import LIMIT_S, until

pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium here: looked for {', '.join(NAMES)}")

TOKEN = "sliders"
NOTEBOOKS = {
    "playground": """
        from paged_infer.viz.playground import Playground
        from paged_infer.viz.style import new_picture

        def draw(height, colour):
            picture = new_picture(3, 2)
            picture.subplots().bar([0], [height], color=colour)
            return picture

        Playground(draw, height=(0.0, 4.0, 1.0), colour=["teal", "orange"])""",
    "explorer": """
        from paged_infer.viz.explorer import explore
        from paged_infer.bench.gallery import crowded_trace

        explore(crowded_trace())""",
    "pool": """
        from paged_infer.viz.explorer import explore_pool
        from paged_infer.bench.gallery import crowded_trace

        explore_pool(crowded_trace())""",
}
IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
# The slider's picture as it is on the screen; the widget shows it under a URL that says nothing of its content.
PIXELS = """image => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab of its own, with the notebooks in its folder and none of the user's settings; its address."""
    folder, settings = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    for name, source in NOTEBOOKS.items():
        write_notebook(folder / f"{name}.ipynb", source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.root_dir": folder,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": TOKEN,
        "LabApp.expose_app_in_browser": True,
        "LabApp.news_url": "None",
    }
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    log = settings / "log"
    with log.open("wb") as lines:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())],
            env={**os.environ, **{home: str(settings / home.lower()) for home in homes}},
            stdout=lines,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_served(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()  # it ends its kernels
            try:
                server.wait(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                server.kill()


def write_notebook(path: Path, source: str) -> None:
    lines = source.strip("\n").splitlines()
    cell = nbformat.v4.new_code_cell("\n".join(line.removeprefix(" " * 8) for line in lines))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)


def wait_until_served(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    def is_served() -> bool:
        try:
            with urlopen(url, timeout=LIMIT_S):
                return True
        except (URLError, TimeoutError):
            return False

    until(lambda: server.poll() is not None or is_served(), lambda: log.read_text()[-2000:])
    assert server.poll() is None, f"JupyterLab did not start:\n{log.read_text()[-2000:]}"


def test_jupyterlab_serves_the_notebooks(lab):
    """What the browser needs from the server, where there is no browser to ask for it."""
    with urlopen(f"{lab}/lab/tree/playground.ipynb?token={TOKEN}", timeout=LIMIT_S) as answer:
        page = answer.read().decode()
    assert answer.status == 200 and '"exposeAppInBrowser": true' in page
    with urlopen(f"{lab}/api/contents/explorer.ipynb?token={TOKEN}", timeout=LIMIT_S) as answer:
        assert b"crowded_trace" in answer.read()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@needs_chromium
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_moved_slider_changes_the_picture(lab, browser, name):
    page = browser.new_page(viewport={"width": 1400, "height": 1200})
    page.set_default_timeout(1e3 * LIMIT_S)
    try:
        page.goto(f"{lab}/lab/tree/{name}.ipynb?token={TOKEN}&reset")
        page.wait_for_function(IDLE)
        page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        image = page.locator("img.widget-image")
        image.wait_for(state="visible")
        page.wait_for_function("image => image.naturalWidth > 0", arg=image.element_handle())
        before = image.evaluate(PIXELS)
        page.wait_for_timeout(500)
        assert image.evaluate(PIXELS) == before, "the picture changes by itself"

        handle = page.locator(".noUi-handle").first
        handle.focus()
        for _ in range(3):
            handle.press("ArrowRight")
        shown = [image.element_handle(), before]
        page.wait_for_function(f"([image, before]) => ({PIXELS})(image) !== before", arg=shown)
    finally:
        page.close()
