from __future__ import annotations

import pytest
from ties_native import LEVELS


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", request.param)
    return request.param
