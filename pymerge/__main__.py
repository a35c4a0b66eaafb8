"""The console script `pymerge`, which is `python -m pymerge` too."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn

_INTERRUPTED = 130


def mergekit_yaml() -> None:
    """The console script `pymerge-mergekit-yaml`, which is `pymerge mergekit-yaml`."""
    sys.argv.insert(1, "mergekit-yaml")
    main()


def main() -> None:
    """Run the command line. From here on, during imports too, Ctrl-C prints a line and exits with
    status 130.
    """
    try:
        sys.exit(_run())
    except MemoryError:  # possibly before there is a command to report it
        sys.stderr.write("error: not enough memory\n")
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stderr.write("\ninterrupted\n")
        _end()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _end()
        raise
    finally:
        # The work is done. Ctrl-C while the interpreter ends would only change the exit status to
        # that of a process killed by a signal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run() -> int:
    """The exit status of the command that the arguments name."""
    import click

    from pymerge.cli.main import commands
    from pymerge.cli.merging import Process

    try:
        # Not standalone, where click takes an interrupt outside of a command for a failure.
        status = commands.main(prog_name="pymerge", obj=Process(), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
    return int(status or 0)


def _end() -> NoReturn:
    """Exit with status 130. Python would instead die by the signal if Ctrl-C came while it executed
    code from a string, as it does to define a dataclass.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
