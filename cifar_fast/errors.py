"""The mistakes a user can mend: each message says what is wrong, with which value, and what to do next."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend; the command line shows its message, no traceback."""


class DataError(UserError):
    """The data set is missing, damaged, of the wrong shape, or cannot be stored."""


class RecipeError(UserError):
    """A recipe names an unknown field or asks for something that cannot be computed."""


class RunError(UserError):
    """A run folder cannot be written, cannot be read, or does not hold what its recipe says."""


class TrainingError(UserError):
    """Training cannot go on, for instance because the loss is no longer a number."""


class RankError(RuntimeError):
    """A process of a parallel training raised, died or hung; the message names its rank and holds its traceback."""
