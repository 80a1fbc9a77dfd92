"""From a typed graph to a launch program for the cuda engine.

`lower` walks the graph and turns every operation, with those around it that its kernel does as well, into a `calls.Call`. What moves
data alone becomes a `views.View` of memory that is there already. `weights` and `arena` then give the buffers their places,
and `program` makes the launches.
"""
