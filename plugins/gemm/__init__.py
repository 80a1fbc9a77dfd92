"""Matrix products with what comes before and after them in a network: groups, bias, rotation, activation, residual, scatter.

`specification` says what is computed, `reference` does so plainly, `kernel` is the Triton kernel and `hopper` the one
for sm 9.0, and `launches` cuts the work into tiles and makes the launches.
"""
