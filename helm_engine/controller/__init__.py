"""Where the boundary between both tenants is to be: what is observed, and who decides."""
