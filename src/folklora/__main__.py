"""`folklora` and `python -m folklora`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; say in words what it needs where that is not installed."""
    try:
        from folklora.cli import run
    except ModuleNotFoundError as error:
        if error.name in ("typer", "rich"):
            sys.exit(f"the command line needs {error.name}: pip install 'folklora[cli]'")
        raise
    run()


if __name__ == "__main__":
    main()
