"""Prefect flows that wire the stages, and the ``lorasuite`` command line."""

import atexit
import gc
import os

# Python's last act is a garbage collection, and with torch and transformers loaded it takes two seconds. What is still
# there goes with the process.
atexit.register(gc.freeze)

# Read by Prefect when it is first imported; a user's own setting stays.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

# Read by OpenMP when torch is first imported. Threads that spin while they wait make small models ten times slower on
# a machine that has other work to do, and hardly help on one that has none.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Prefect's temporary server takes longer than its 20 s to start on a machine that is busy.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
