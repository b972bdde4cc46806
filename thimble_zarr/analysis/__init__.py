"""From disk to answers: lazy variables, the per-step table, the verdict."""
