"""Records and data sets, the hub, and the folders that results are written to."""
