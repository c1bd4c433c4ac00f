"""Processes and machines: ranks, rendezvous, watchdog, locks, clocks."""
