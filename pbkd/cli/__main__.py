"""``python -m pbkd.cli``."""

from pbkd.cli import main

main()
