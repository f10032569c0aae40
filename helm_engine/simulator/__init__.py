"""The engine in virtual time: its own scheduler and pool, requests and devices made up."""
