"""Convolutions of feature maps with contiguous channels, as matrix products whose rows are pixels.

`specification` says what it computes, `reference` does so plainly, `kernel` has the kernels and `launches` what to launch.
"""
