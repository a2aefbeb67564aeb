"""The browser of these tests, and what they need for it."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WAIT_SECONDS = 600  # most that may pass: a machine may be slow and busy with other tests, but never stand still
NEEDS_CHROMIUM = (
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs Playwright: pip install -e '.[test]'"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium, or set CHROMIUM to one"),
)
