"""Real processes, spoken to as a client would."""
