"""Something done with many photos, by one process, by several, or by many machines.

A job is cut into pieces. Whoever does a piece writes its results under a temporary name and
renames them, and does nothing if they are there already: so a piece may be begun any number of
times, on any machine, and a job that was killed goes on where it stopped.
"""
