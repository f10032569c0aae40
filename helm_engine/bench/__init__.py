"""Load on a running server, and what came of it; loads no torch."""
