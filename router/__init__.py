"""Which engine serves a request.

Today one engine is served, in the process that answers HTTP, so there is nothing to choose
between: this package is an empty room, kept for the dispatcher that will price several engines and
pick one. It will know engines only through the wire types and hashes of `block_manager` and the
request schema in `helm_engine.protocol`, and will never import torch.
"""
