"""Simulated world of long histories in two domains: ``limelight data simulate --world cross``.

Its purpose is to compare the history searches of Cross (Moment&Cross, section 3.2). Five interests decide the users'
behaviours in live rooms. Each interest is visible in one sequence of past visits far better than in the others:

=============  ===========================================================  ============================================
interest       meaning                                                      sequence that reveals it
=============  ===========================================================  ============================================
``mood``       fast: genre of authors that a user prefers in a session      ``short``: authors of the videos watched
                                                                            last, whether the user liked them or not
``slow``       lasting: a user's liking for each of many niches             ``long``: views of videos of the candidate's
                                                                            niche, of any author at any time
``bond``       lasting: a user's liking for each author                     ``author``: clicks on the author's videos of
                                                                            any niche
``live_slow``  lasting: a user's liking for a niche in live rooms only      ``live_long``: behaviours in rooms of the
                                                                            candidate's niche
``theme``      slower than a session: style of authors that the user        ``mixed``: authors of the videos and rooms
               watches for long                                             that the user watched for long
=============  ===========================================================  ============================================

Only the mood affects which items are shown, and no behaviour affects an interest or a later exposure. All exposures of
a block of users are therefore drawn at once, and every probability is known (``truth/``). Unlike in
``trainer.data.simulator``, there is no follow relation and the hour of the day has no effect.
"""
