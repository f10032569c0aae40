"""Models by architecture and dialect."""
