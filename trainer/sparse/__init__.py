"""Sharded and dynamic tables, and how ids and rows travel."""
