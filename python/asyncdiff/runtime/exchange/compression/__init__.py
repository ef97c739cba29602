"""Bundles that cross compressed: codes of what changed, in blocks with a scale each."""
