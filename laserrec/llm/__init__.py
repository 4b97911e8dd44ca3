"""The frozen language model: fetching, loading, running it, and item vectors from its outputs."""
