"""Hybrid engine: sharded tables and a dense network trained as one model."""
