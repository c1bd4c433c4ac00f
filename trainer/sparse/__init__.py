"""Sharded and dynamic embedding tables, and the exchange of their ids, rows and gradients between ranks."""
