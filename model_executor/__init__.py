"""Everything that touches a device.

This package owns the one allocation that holds all pages, the model layers and their attention
over paged KV, the checkpoints they are loaded from, and the runner that carries out one scheduled
step. It imports torch and the types of `block_manager`, takes its orders through the types in
`model_executor.step`, and knows nothing of requests, HTTP or routing.
"""
