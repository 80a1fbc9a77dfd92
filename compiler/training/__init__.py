"""Training a small MASt3R from scratch on `smc.compiler.scenes`: `python -m smc.compiler.training --help`, docs/training.md.

`plan.py` is the curriculum, `losses.py` what is minimised, `network.py` the model as it is trained, `state.py` the files of a
run, and `train.py` the loop. Not a command of `smc`: who compiles and deploys a model never runs it, and it needs photographs
that are not part of the package.
"""
