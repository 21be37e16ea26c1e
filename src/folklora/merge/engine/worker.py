"""One of the processes that `folklora merge --workers` starts: does its share of a merge that was begun."""

from __future__ import annotations

import sys
from pathlib import Path

from folklora.merge.engine.job import resume
from folklora.merge.engine.run import do_share
from folklora.merge.engine.team import BEGUN
from folklora.stream.files import read_json, write_json


def main(folder: str, device: str, processes: str, rank: str) -> int:
    """Do one share; an expected error goes into a file that the parent reads."""
    work = Path(folder)
    try:
        do_share(resume(work), work, set(read_json(work / BEGUN)), int(rank), int(processes), device)
    except (ValueError, OSError) as error:
        write_json(work / f"error-{rank}.json", {"kind": type(error).__name__, "message": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
