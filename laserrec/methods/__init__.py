"""Ways to recommend: Laser, its rivals, and the parts that several of them share."""
