"""A world for long histories of two domains: ``limelight data simulate --world cross``.

Made to tell the searches of Cross (Moment&Cross, section 3.2) apart. Five interests decide what users do in live rooms,
and each shows itself in one sequence of past visits far better than in the others:

=============  ===========================================================  ============================================
interest       what it is                                                   where it shows
=============  ===========================================================  ============================================
``mood``       fast: the genre of authors a user is after in a session      ``short``: whose videos were just watched;
                                                                            not whether they were liked
``slow``       lasting: a user's liking for each of many niches             ``long``: whether videos of the candidate's
                                                                            niche, of anybody and any time, were watched
``bond``       lasting: a user's liking for each author                     ``author``: whether the author's videos, of
                                                                            any niche, were clicked
``live_slow``  lasting: a user's liking for a niche in live rooms only      ``live_long``: what became of rooms of the
                                                                            candidate's niche
``theme``      slower than a session: the style of authors that holds       ``mixed``: whose videos and rooms were
               the user                                                     watched for long
=============  ===========================================================  ============================================

Interests come about on their own and change nothing of what is shown but for the mood; nothing that happens feeds back.
All exposures of some users are therefore drawn at once, and every probability is known (``truth/``). Unlike in
``trainer.data.simulator``, following is no state, and hours of the day do not matter.
"""
