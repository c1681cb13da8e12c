"""``python -m flextron.cli``: the command line."""

import sys

from flextron.cli import main

sys.exit(main())
