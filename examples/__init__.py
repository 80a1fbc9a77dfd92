"""Photographs that the demo and every build's verification run on. Origin and licence: README.md beside this."""
