"""Runs as jobs of a Ray cluster: what is asked for (`request`), the cluster (`cluster`), its jobs (`job`)."""
