"""A pytest plugin (`-p patched`) for other packages' own test suites: the patches are on for all of
a run.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types

# Imported by test modules of peft, not used by the tests that are run.
for _name, _attribute in (("datasets", "load_dataset"), ("diffusers", "StableDiffusionPipeline")):
    if importlib.util.find_spec(_name) is None:
        _module = types.ModuleType(_name)
        _module.__spec__ = importlib.machinery.ModuleSpec(_name, None)
        setattr(_module, _attribute, None)
        sys.modules[_name] = _module


_loaded = []


def pytest_configure(config):
    from pymerge import compat

    with contextlib.suppress(ModuleNotFoundError):
        import mergekit  # noqa: F401
        import mergekit_common

        sys.modules["tests.common"] = mergekit_common

    for each in (compat.peft, compat.mergekit):
        with contextlib.suppress(ModuleNotFoundError):  # one of the two may not be installed
            each.patch()

    from pymerge.backends import registry

    def counted(op, name):
        _loaded.append(op)
        return original(op, name)

    original = registry.load
    registry.load = counted


def pytest_sessionfinish(session):
    """Without the patches all tests would pass too."""
    if session.testscollected and not _loaded:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(_loaded)} calls of the kernels")
