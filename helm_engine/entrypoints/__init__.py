"""How people reach the engine: command line and HTTP."""
