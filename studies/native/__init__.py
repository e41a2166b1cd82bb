"""A small model whose sequence is high-res already, as those are that read pictures of any size."""
