"""Who owns which page.

This package keeps the books of the paged memory pool that embedding rows and KV blocks share:
which tenant owns a page, which block or row sits in it, who still uses it and what may be evicted
next. It does bookkeeping only, in Python and NumPy: it imports no torch, opens no sockets and uses
none of our other packages. It answers with plans (what to load where, what to copy); carrying them
out on a device is the work of `model_executor`.
"""
