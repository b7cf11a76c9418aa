"""Prefect flows that wire the stages, and the ``lorasuite`` command line."""

import os

# Read by Prefect when it is first imported; a user's own setting stays.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
