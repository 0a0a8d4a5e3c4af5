"""The page in a browser, where there is a Chromium: nothing is cut off, light or dark."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from made_up_run import make_run, sample, steps

from fastpg.report.page import write_page

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

# It runs beside the page: the page itself has no script.
MEASURE = """
const page = document.querySelector("iframe").contentDocument, view = page.defaultView;
const outside = [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width)
  .flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
    const a = svg.getBoundingClientRect(), b = text.getBoundingClientRect();
    return b.left < a.left - 1 || b.right > a.right + 1 || b.bottom > a.bottom + 3;
  }).map(text => text.textContent));
document.body.append(Object.assign(document.createElement("pre"), {textContent: JSON.stringify({
  overflow: page.documentElement.scrollWidth - view.innerWidth,
  outside: outside,
  small: page.querySelectorAll("svg.small")[0].getBoundingClientRect().width,
  paper: view.getComputedStyle(page.body).backgroundColor,
  requests: view.performance.getEntriesByType("resource").length,
})}));
"""


def measured(folder, page, width, *flags):
    """What a browser says of a page in a window of that width."""
    frame = (
        f'<iframe style="width: {width}px; height: 900px" srcdoc="{html.escape(page)}"></iframe>'
    )
    path = folder / "frame.html"
    path.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body>{frame}"
        f"<script>onload = () => {{ {MEASURE} }}</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    finished = subprocess.run(
        [*command, profile, *flags, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search("<pre>(.*)</pre></body>", finished.stdout)
    assert found, finished.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [360, 1440])
def test_a_page_fits_its_window_in_light_and_dark(tmp_path, width):
    long = "a_name_without_any_space_that_goes_on_" * 4
    samples = {0: [sample(long, prompt=long)], 20: [sample(long, prompt=long)]}
    more = {f"rewards/{name}/mean": 123456.0 for name in ("a", "b")}
    directories = [
        make_run(tmp_path / long[:60] / name, steps(40, **more), evaluations=samples)
        for name in ("one", "two", "three")
    ]
    for runs in (directories[:1], directories):
        page = write_page(runs).read_text(encoding="utf-8")
        light = measured(tmp_path, page, width)
        dark = measured(tmp_path, page, width, "--blink-settings=preferredColorScheme=0")
        assert (light.pop("paper"), dark.pop("paper")) == ("rgb(255, 255, 255)", "rgb(20, 23, 28)")
        for found in (light, dark):
            assert (found["small"] > 0) == (width == 360)
            assert found["overflow"] <= 0 and found["outside"] == [] and found["requests"] == 0
