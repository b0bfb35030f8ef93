"""What a script tells its user in one line, without a traceback."""


class UserError(ValueError):
    """Something the user asked for or supplied cannot be used; the message says what, and what to do."""
