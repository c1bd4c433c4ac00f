"""Instruction samples from a dataset's visits and comments: the three tasks of LCU (papers: LCU, section on tuning).

``visits`` are the dataset's visits in arrays, ``past`` what a user did before a time, ``buckets`` the ranges of
staytimes, ``tasks`` the samples themselves, ``write`` the files, ``cli`` the command.
"""
