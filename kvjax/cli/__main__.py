"""`python -m kvjax.cli`: the `kvjax` command without an installed script."""

import sys

from kvjax.cli import main

sys.exit(main())
