"""One forward of a patched model: what it is given, what it carries through the layers, what they do with it."""
