"""Instruction samples from a dataset's visits and comments, for the three tuning tasks of the LCU paper.

``visits`` reads the visits and texts of a dataset, ``past`` looks up what a user did before a time, ``buckets`` has the
ranges of staytimes, ``tasks`` makes the samples, and ``write`` writes the files. The command is in
``launch/cli/data_instructions.py``.
"""
