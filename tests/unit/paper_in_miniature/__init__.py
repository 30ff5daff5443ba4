"""Of the extra ``reproduction``."""

import pytest

pytest.importorskip("scipy", reason="the extra reproduction is not installed")
