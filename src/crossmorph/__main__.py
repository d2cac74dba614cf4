"""``python -m crossmorph``: the command, where its script is not on the path."""

import sys

from crossmorph.cli import main

sys.exit(main())
