"""Textured 3D scenes seen by two cameras, with exact ground truth: what the small model is trained and judged on.

`photographs.py` and `textures.py` give surfaces their look, `geometry.py` casts rays, `draw.py` invents scenes and cameras,
`render.py` makes images, and `pairs.py` puts it together. All in torch, batched, on any device; from one seed the same
scenes. docs/training.md says what is in them and what is not.
"""
