"""The command line: a verb per stage, and what drives or shows the whole.

Heavy libraries are imported by the verb that needs them, so that ``--help`` is quick. Verbs
appear in the help in the order of these imports.
"""

# ruff: isort: off
from pbkd.cli.app import app as app, main as main
from pbkd.cli import stages as stages
from pbkd.cli import drivers as drivers
from pbkd.cli import models as models
from pbkd.cli import servers as servers
