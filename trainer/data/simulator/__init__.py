"""The simulated world: who lives in it, what is on air, what is shown to whom, and what they do.

``population`` (genres, authors, users) and ``content`` (videos, rooms, 30 s segments) are drawn first; together with
the ``exposure`` policy's indices they are a ``world``. ``life`` leads the users through their days, with what their
``memory`` keeps; ``behaviours`` has the true probabilities and ``visit`` what comes of them. ``description`` and
``log`` write it down in the canonical form, for ``trainer.data.simulator.write_dataset``.
"""
