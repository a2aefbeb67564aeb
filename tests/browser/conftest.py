"""One Chromium for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chromium import CHROMIUM, WAIT_SECONDS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            timeout=1000 * WAIT_SECONDS,
            executable_path=CHROMIUM,
            args=["--disable-dev-shm-usage"],  # containers have a small one
            chromium_sandbox=False,  # which root cannot have
        )
        yield browser
        browser.close()
