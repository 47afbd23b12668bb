"""Alignment one layer at a time, from disk to disk, for models that do not fit in memory."""
