"""What reading closer costs in seconds and bytes, one script a question; each prints or writes JSON."""
