"""One thin file per command; nothing here imports torch when loaded."""
