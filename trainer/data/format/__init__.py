"""What is on disk, and reading it."""
