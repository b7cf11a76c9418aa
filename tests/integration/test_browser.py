"""The browser that tests of pages use sees what it is to see."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.browser import needs_chromium, page

PAGE = """<!doctype html><body style="margin: 0; background: #123456; height: 3000px">
<img src="data:image/png;base64,iVBORw0KGgo=" alt=""><p>Here</p>
<script>fetch("missing.json").catch(() => console.error("not found")); throw new Error("on purpose")</script>"""


@needs_chromium
def test_pictures_errors_and_requests(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGE)
    with page(width=390, height=500) as seen:
        seen.page.goto(file.as_uri())
        seen.page.get_by_text("Here").wait_for()
        seen.page.screenshot(path=tmp_path / "window.png")
        seen.page.screenshot(path=tmp_path / "whole.png", full_page=True)
    with Image.open(tmp_path / "window.png") as window, Image.open(tmp_path / "whole.png") as whole:
        assert window.size == (390, 500) and whole.size == (390, 3000)
        assert window.convert("RGB").getpixel((200, 300)) == (0x12, 0x34, 0x56)
    assert "on purpose" in seen.errors and "not found" in seen.errors
    assert seen.requests[0] == file.as_uri() and all("data:" not in url for url in seen.requests)
