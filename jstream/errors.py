"""What ends a command with a line and no stack trace."""


class UserError(Exception):
    """Something that the user can mend. The message is one line: what was expected, what was found, what to do."""


class Stopped(Exception):
    """A run was told to stop, and everything is saved."""
