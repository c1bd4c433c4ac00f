"""Processes and machines: ranks, rendezvous, watchdog, run lock, phase timer."""
