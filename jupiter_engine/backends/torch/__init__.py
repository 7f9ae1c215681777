"""The torch twin."""
