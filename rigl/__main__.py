"""`python -m rigl`, the same as the `rigl` command."""

import sys

from .cli import main

sys.exit(main())
