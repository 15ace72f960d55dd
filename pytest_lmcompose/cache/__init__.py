"""The cache: finished states and measurements under content addresses, so nothing is computed twice."""
