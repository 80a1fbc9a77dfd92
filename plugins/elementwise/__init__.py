"""Elementwise operations on strided views, plain copies among them: what no other kernel takes in."""
