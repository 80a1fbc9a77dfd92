"""Sums and norms of rows: what no other kernel takes in."""
