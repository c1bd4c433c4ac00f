"""Peers of ``benchmarks/speed/throughput.py``: programs that train on the same rows, each on its own libraries.

A program runs under the Python in which its peer is installed. So it imports torch, NumPy and the peer, and nothing of
Limelight: ``PYTHON FILE MODE DATA OUT.npz``. ``DATA`` is what ``benchmarks/speed/workload.py`` writes. ``OUT.npz`` gets
``rows`` and ``seconds`` after the warm-up, ``probability [held-out rows, behaviours]``, and ``behaviours``, the columns
that were learnt.
"""
