"""Files by key: where the bytes of a store lie."""
