"""One HTML page about a run. Needs the extra `report`."""
