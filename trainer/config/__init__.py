"""The schema of every job file, and how one is read."""
