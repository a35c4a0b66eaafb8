"""The console script `pymerge`, which is `python -m pymerge` too."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C gives a line and exit status 130 from here on, while modules are
    imported too.
    """
    try:
        from pymerge.cli.main import Process, commands

        commands(prog_name="pymerge", obj=Process())
    except MemoryError:  # even before there was a command to say it
        sys.stderr.write("error: not enough memory\n")
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
