"""Attention over paged K and V, behind one registry."""
