"""The small model in motion: what it reads of clips, in space and in time."""
