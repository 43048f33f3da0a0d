"""`python -m meta_test` is `lopt-eval`."""

import sys

from meta_test.cli import main

if __name__ == "__main__":
    sys.exit(main())
