"""Offline batch scoring: a file of OpenAI batch lines in, a file of answers out."""
