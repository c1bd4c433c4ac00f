"""Semantic ids: codes of what a room shows, and the store of an author's recent codes."""
