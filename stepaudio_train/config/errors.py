"""Errors that are told to the user as they are, without a traceback."""


class UserError(Exception):
    """Something that the person who typed the command can mend; the message says how."""


class ConfigError(UserError, ValueError):
    """Everything that is wrong with a configuration, all at once.

    Each problem names the dotted key, the value, the rule and what to type instead.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} problem(s) in the configuration:\n{listed}")
