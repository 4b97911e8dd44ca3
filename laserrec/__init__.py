"""Laser: sequential recommendation with a frozen LLM, tuned by a prefix and a suffix alone."""

__version__ = "0.1.0"
