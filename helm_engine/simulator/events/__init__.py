"""Laws of events: which items are in histories and among candidates, a file for each setting."""
