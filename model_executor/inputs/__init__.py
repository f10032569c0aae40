"""From a request's features to the tokens a model reads, one module for each dialect."""
