"""Is a store what its writer committed, and if not, what can be kept of it?"""
