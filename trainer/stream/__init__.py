"""From a live event log to training rows."""
