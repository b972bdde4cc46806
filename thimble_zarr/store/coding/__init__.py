"""How a block becomes bytes, and bytes a block."""
