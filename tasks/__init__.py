"""Prefect tasks, one per stage: refs in, one library call, a ref out."""
