"""Which engine serves a request.

`dispatcher.Dispatcher` is what others use. `cost` says what a request costs on each engine,
`policies` which cost counts, `engine_registry` what each engine has to do already, and `residency`
what it holds, from the events that it sends: KV blocks in `prefix_index`, rows in `row_index`. This
package knows engines only through the wire types and hashes of `block_manager` and the request
schema in `helm_engine.protocol`, and never imports torch.
"""
