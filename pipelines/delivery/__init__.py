"""Get every change to every target that wants it."""
