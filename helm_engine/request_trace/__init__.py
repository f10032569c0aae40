"""Requests that a server took, in a file without anybody's ids."""
