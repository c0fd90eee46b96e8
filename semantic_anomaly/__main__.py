"""`python -m semantic_anomaly` is the command `semantic-anomaly`."""

import sys

from semantic_anomaly.cli import main

sys.exit(main())
