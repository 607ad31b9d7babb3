"""``python -m dibit`` is ``dibit``."""

import sys

from dibit.cli import main

if __name__ == "__main__":
    sys.exit(main())
