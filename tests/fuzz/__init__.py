"""Requests that nobody would think of, against the parser and against a real server."""
