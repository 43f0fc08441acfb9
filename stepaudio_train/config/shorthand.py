"""Parts of a configuration that a file's name may stand for."""


class NamedByFile:
    """A part with a field `path`: typed as `part=FILE`, it means `part.path=FILE`, whatever groups configs/ holds."""
