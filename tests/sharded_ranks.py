"""Several processes of one machine that run the same functions, started once for many of them.

Run as a script by `Processes`: imports a module, forks the ranks, which begin with what is
imported, and has them run the functions whose names come in on standard input, one a line.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TextIO

TESTS = Path(__file__).parent


class Processes:
    """Ranks of one process group over Gloo, for the functions `module.CASES`."""

    def __init__(self, module: str, world: int, store: Path) -> None:
        paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
        self._started = subprocess.Popen(
            [sys.executable, __file__, module, str(world), str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def run(self, name: str) -> list[str]:
        """Run a function on all ranks. Returns each rank's traceback, "" where there is none."""
        assert self._started.stdin is not None and self._started.stdout is not None
        self._started.stdin.write(f"{name}\n")
        self._started.stdin.flush()
        line = self._started.stdout.readline()
        answers: list[str] = json.loads(line) if line else ["the processes ended"]
        return answers

    def end(self) -> None:
        self._started.communicate()


def _start(module: str, world: int, store: str) -> None:
    cases = importlib.import_module(module).CASES
    ranks = []
    for rank in range(world):
        asked, ask = os.pipe()
        answered, answer = os.pipe()
        if os.fork() == 0:
            # An end of another rank's pipe that stays open here keeps that rank waiting.
            for end in (ask, answered, *(each.fileno() for pair in ranks for each in pair)):
                os.close(end)
            try:
                _serve(rank, world, store, cases, os.fdopen(asked), os.fdopen(answer, "w"))
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answer)
        ranks.append((os.fdopen(ask, "w"), os.fdopen(answered)))
    for line in sys.stdin:
        for ask_rank, _ in ranks:
            ask_rank.write(line)
            ask_rank.flush()
        answers = [json.loads(answered_by.readline() or '"ended"') for _, answered_by in ranks]
        print(json.dumps(answers), flush=True)
    for ask_rank, _ in ranks:
        ask_rank.close()
    for _ in ranks:
        os.wait()


def _serve(rank: int, world: int, store: str, cases: dict, asked: TextIO, answer: TextIO) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for line in asked:
        try:
            cases[line.rstrip("\n")]()
            said = ""
        except BaseException:
            said = traceback.format_exc()
        answer.write(json.dumps(said) + "\n")
        answer.flush()


if __name__ == "__main__":
    _start(sys.argv[1], int(sys.argv[2]), sys.argv[3])
