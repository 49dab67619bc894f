"""`python -m lorabench` is the command line."""

import sys

from lorabench.cli import main

sys.exit(main())
