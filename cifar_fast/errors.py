"""Errors that a person can fix: each message says what is wrong, with which value, and what to do next."""


class UserError(ValueError):
    """A mistake that the user can fix; the command line prints its message without a traceback."""


class DataError(UserError):
    """The data set is missing, damaged, of the wrong shape, or cannot be stored."""


class DataNotFoundError(DataError):
    """There is no data set on this machine and none could be downloaded; only then may synthetic data stand in."""


class RecipeError(UserError):
    """A recipe names an unknown field or asks for something that cannot be computed."""


class RunError(UserError):
    """A run folder cannot be written, cannot be read, or does not match its recipe."""


class TrainingError(UserError):
    """Training cannot continue, for instance because the loss is no longer a number."""


class TricksError(UserError):
    """A function of the reader's own does not fit into a training run, or cannot travel to other processes."""


class RankError(RuntimeError):
    """A process of a parallel run raised an error, died or hung; the message names its rank and has its traceback."""
