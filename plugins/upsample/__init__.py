"""Bilinear enlargement of feature maps with contiguous channels.

`specification` says what it computes, `reference` does so plainly, `kernel` has the kernel and `launches` what to launch.
"""
