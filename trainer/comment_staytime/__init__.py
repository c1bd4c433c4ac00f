"""The staytime job's library."""
