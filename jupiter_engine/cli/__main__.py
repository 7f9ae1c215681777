"""`python -m jupiter_engine.cli`."""

import sys

from jupiter_engine.cli.main import main

sys.exit(main())
