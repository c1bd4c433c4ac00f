"""Instruction samples: the three tasks of LCU from visits and comments, and the two of LARM from segments of rooms.

Of visits, ``visits`` reads visits and texts, ``past`` looks up what a user did before a time, ``buckets`` has the
ranges of staytimes, ``tasks`` makes the samples, and ``write`` writes the files.

Of segments, ``segments`` reads what is known about them, ``annotations`` reads files of questions and descriptions,
``world_truth`` has those of a simulated world, ``annotate`` asks a larger model for them through ``chat_endpoint``,
``segment_tasks`` makes the samples, and ``write_segments`` writes the files.

``sample_files`` has what both share. The command is in ``launch/cli/data_instructions.py``.
"""
