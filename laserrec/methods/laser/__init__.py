"""Laser (Zhang et al. 2024): a frozen LLM that is tuned by a prefix and a suffix."""
