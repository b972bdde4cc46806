"""The catalogue of causes: what can be wrong with a record, in the order in which it is asked.

One small class a cause (`places`, `amounts`); its docstring is the message. A failure is put before
each, and the first that explains it is the cause.
"""

from thimble_zarr.analysis.causes.amounts import (
    CastStates,
    ExternalChange,
    OtherLearningRate,
    OtherWeightDecay,
    RescaledGradient,
    ScaledGradient,
    WrongGradient,
)
from thimble_zarr.analysis.causes.cause import Cause, Facts
from thimble_zarr.analysis.causes.evidence import Evidence, Failure
from thimble_zarr.analysis.causes.places import (
    BitFlip,
    MissingRow,
    PermutedRows,
    PermutedTokens,
    ShiftedHyperparameters,
    ShiftedRows,
    TornRow,
)


class Unbalanced(Cause):
    """Rows from step {step} on do not follow from the rows before.

    The first difference is in {variable}, at {place}. No known cause explains it.
    """

    code = "unbalanced"

    def explain(self, evidence: Evidence, failure: Failure) -> Facts:
        return {}


CAUSES: tuple[Cause, ...] = (
    BitFlip(),
    MissingRow(),
    PermutedTokens(),
    TornRow(),
    ShiftedRows(),
    ShiftedHyperparameters(),
    PermutedRows(),
    ScaledGradient(),
    RescaledGradient(),
    CastStates(),
    OtherLearningRate(),
    OtherWeightDecay(),
    ExternalChange(),
    WrongGradient(),
    Unbalanced(),
)
"""Those that prove themselves to the bit come first."""
