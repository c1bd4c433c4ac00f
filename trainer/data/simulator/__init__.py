"""Simulated world: users, authors, videos and live rooms, the exposure policy and the users' behaviours.

``population`` (genres, authors, users) and ``content`` (videos, rooms, 30 s segments) are drawn first. Together with
the indices of the ``exposure`` policy they form a ``world``. ``user_days`` simulates the users day by day and keeps
their changing state in ``user_state``. ``behaviours`` computes the true probabilities and ``visit_outcome`` draws from
them. ``description`` and ``event_log`` convert the result to the canonical tables that
``trainer.data.simulator.write_dataset`` writes. ``segment_vectors`` and ``segment_truth`` add vectors of the segments
and the best possible prediction of the next one, ``lookahead`` the effect of what is about to come in a room.
``factors`` writes the terms of the log-odds.
"""
