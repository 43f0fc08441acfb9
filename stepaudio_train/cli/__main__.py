"""`python -m stepaudio_train.cli`."""

import sys

from stepaudio_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
