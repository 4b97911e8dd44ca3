"""LaserRecommender and what belongs to it: fitting, model folders, ranking, cards and the hub."""
