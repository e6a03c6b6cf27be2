"""A report in Chromium without a window, for the tests that look at what is drawn; they are skipped where it is not installed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


@contextmanager
def opened(report: Path, profile: Path, figures: int) -> Iterator[Any]:
    """The browser with a report open and its figures drawn."""
    driver = start(profile)
    try:
        driver.get(report.as_uri())
        deadline = time.monotonic() + 600  # a guard against waiting for ever, not a measure
        while driver.execute_script("return document.querySelectorAll('.js-plotly-plot .main-svg').length") < figures:
            assert time.monotonic() < deadline, f"figures were not drawn; the browser says {driver.get_log('browser')}"
            time.sleep(0.2)
        yield driver
    finally:
        driver.quit()


def start(profile: Path) -> Any:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        programs.append(None)
    if None in programs:
        reason = "chromium, chromedriver and selenium are needed to look at the report"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(programs[1])))
    driver.set_script_timeout(300)
    return driver
