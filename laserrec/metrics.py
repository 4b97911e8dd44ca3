"""The target's rank and the metrics of one rank (paper, 4.1.3).

Tie rule: the target's rank is the mean of the places that it and its equals would take, 1 + better + (equals - 1) / 2.
A model that scores everything alike thus gets the middle rank, not the first.
"""
