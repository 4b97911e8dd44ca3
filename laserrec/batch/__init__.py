"""Recommendations for a file of histories: in one process, in shards or on a Ray cluster."""
