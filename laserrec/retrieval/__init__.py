"""Nearest-neighbour indexes of item embeddings: exact, usearch and Qdrant."""
