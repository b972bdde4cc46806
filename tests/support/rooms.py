"""The rooms of the house: who may import whom."""

MAY_IMPORT = {
    "errors": set(),
    "interrupts": set(),
    "tuning": set(),
    "bits": {"errors"},
    "optim": {"bits", "errors"},
    "format": {"optim", "bits", "errors"},
    "store": {"format", "optim", "bits", "errors", "interrupts", "tuning"},
    "sources": {"store", "format", "optim", "bits", "errors", "interrupts", "tuning"},
    "record": {"causes", "store", "format", "optim", "bits", "errors", "interrupts", "tuning"},
    "causes": {"format", "optim", "bits", "errors", "tuning"},
    "analysis": {"causes", "format", "optim", "bits", "errors", "tuning"},
    "report": {"analysis", "format", "errors"},
    "experiment": {"record", "store", "format", "optim", "errors", "tuning"},
    "integrations": {"record", "store", "format", "errors"},
    "__main__": {"cli"},
    "cli": {"analysis", "errors", "experiment", "format", "interrupts", "record", "report"}
    | {"optim", "sources", "store"},
}

OPENERS = {
    "analysis.check": {"sources"},
    "analysis.dataset.open": {"sources", "store"},
    "analysis.diff.diff": {"sources"},
    "analysis.summary.summary": {"sources"},
}
"""Modules of the analysis that open what they read."""
