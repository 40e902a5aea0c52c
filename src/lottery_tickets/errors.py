"""What can go wrong, one class per kind of mistake.

Every message names the object, what was expected, what came and the remedy. All derive from
`LotteryTicketError`, and each also from the built-in that describes it, so `except ValueError` works.
"""

from __future__ import annotations


class LotteryTicketError(Exception):
    """Base of every exception of this library."""


class SparsityError(LotteryTicketError, ValueError):
    """A sparsity, density or rank that cannot be met."""


class WeightsError(LotteryTicketError, ValueError):
    """Weights that cannot be ranked: NaN, no data (meta), or a data type without magnitudes."""


class ParameterSelectionError(LotteryTicketError, ValueError):
    """A pattern or predicate that selects nothing, or a parameter that cannot be pruned."""


class MaskError(LotteryTicketError, ValueError):
    """Mask contents that are not one bit per weight."""


class MaskMismatchError(LotteryTicketError, ValueError):
    """A mask and a model, or two masks, that do not speak of the same tensors."""


class MaskFileError(LotteryTicketError, ValueError):
    """A ticket file that is damaged, incomplete or of an unknown format."""


class HubError(LotteryTicketError, RuntimeError):
    """A hub that cannot be reached, or that does not have or take what it is asked to."""


class ScoreFileError(LotteryTicketError, ValueError):
    """A file of scores that is damaged, or that holds something else."""


class MaskAppliedError(LotteryTicketError, RuntimeError):
    """A mask is applied where one already is, or cannot be held by the module."""


class StructureError(LotteryTicketError, ValueError):
    """Channels, heads or neurons that cannot be told, removed or left out as asked."""


class BatchError(LotteryTicketError, TypeError):
    """A batch or model output of a form the library does not know."""


class StateMismatchError(LotteryTicketError, ValueError):
    """A saved state and a model that do not speak of the same tensors."""


class EvaluationError(LotteryTicketError, ValueError):
    """A measurement without a value: no batches, or a loss that is not finite."""


class ScoreError(LotteryTicketError, ValueError):
    """Importance scores that cannot be computed: no samples, an overflow, an argument out of range."""


class DetectionError(LotteryTicketError, ValueError):
    """An early-bird detector that cannot be set up or asked so."""


class TrainingError(LotteryTicketError, ValueError):
    """Training that cannot go on as asked: an option out of range, a gradient or a loss of the wrong kind."""


class TrainingMemoryError(TrainingError, RuntimeError):
    """Memory that ran out where the step cannot be taken in smaller pieces."""


class NonfiniteLossError(TrainingError):
    """A loss or a gradient that is NaN or infinite; what it would have moved has not moved."""


class VerdictError(LotteryTicketError, ValueError):
    """A verdict that cannot be given: too few seeds, controls or scores that cannot be compared."""


class RunFolderError(LotteryTicketError, RuntimeError):
    """The folder of a run that is in use, belongs to another configuration, is damaged or cannot be written."""


class CheckpointError(LotteryTicketError, ValueError):
    """A checkpoint folder that cannot be read or written as asked."""


class PlanError(LotteryTicketError, ValueError):
    """A question about memory that has no answer: an unknown operation, model, optimizer or amount."""


class MemoryPlanError(LotteryTicketError, RuntimeError):
    """An operation that needs more memory than is free, refused before it starts."""


class DistributedError(LotteryTicketError, RuntimeError):
    """Work of several processes that ended on all: one failed or has gone, or they do not do the same."""


class ReportError(LotteryTicketError, ValueError):
    """A report that cannot be made: nothing to report at a path, a file that is damaged, an unknown format."""


class MissingExtraError(LotteryTicketError, ImportError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is needed for this and is not installed: pip install 'lottery-tickets[{extra}]'"
        )


class LayerCollapseWarning(UserWarning):
    """A tensor lost all its weights under one global threshold."""
