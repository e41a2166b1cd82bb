"""A demo that needs no download: a small trained model, a scene to ask about, and what an answer costs."""
