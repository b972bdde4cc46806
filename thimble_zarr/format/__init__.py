"""The contract: what a store holds, under which names, and what may be asked of a recording."""
