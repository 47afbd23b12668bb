"""`python -m regraft`."""

import sys

from .cli import main

sys.exit(main())
