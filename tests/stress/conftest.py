"""What takes too long for every run is collected only where a long one was asked for."""

import os

collect_ignore = [] if os.environ.get("FUSEWIRE_STRESS_SECONDS") else ["test_postgresql.py"]
