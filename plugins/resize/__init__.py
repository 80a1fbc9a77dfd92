"""Images of any size to the network's: Pillow's resize and a crop, to the last bit, since the original prepares images with it."""
