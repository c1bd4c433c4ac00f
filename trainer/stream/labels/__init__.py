"""When a behaviour becomes a label."""
