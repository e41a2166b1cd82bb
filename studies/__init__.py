"""Scripts that give the numbers and figures of the docs, one a table or figure."""
