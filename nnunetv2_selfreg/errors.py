"""What went wrong in the user's terms."""


class UserError(Exception):
    """A mistake that the user can mend: the message names the file or value and says what to do.

    The command line prints it as one line instead of a traceback.
    """
