"""Laser: sequential recommendation with a frozen LLM, tuned by a prefix and a suffix alone."""

__version__ = "0.2.0"
__all__ = ["LaserRecommender", "UserError", "__version__"]

from laserrec.util.errors import UserError


def __getattr__(name: str):
    """`LaserRecommender` is loaded when it is first asked for: it brings torch, which takes seconds."""
    if name == "LaserRecommender":
        from laserrec.recommender.recommender import LaserRecommender

        return LaserRecommender
    raise AttributeError(f"module 'laserrec' has no attribute {name!r}")
