"""``pbkd`` and ``python -m pbkd``: the command line, or which extra it lacks."""

from __future__ import annotations

import sys

from pbkd.errors import MissingExtraError


def main() -> None:
    """Entry point."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: {MissingExtraError(str(error.name), 'pipeline', 'the command line')}")
    from pbkd.cli import main as run

    run()


if __name__ == "__main__":
    main()
