"""`lopt-train`, with one line of error where its extra is not installed."""

import sys

from lopt.console import fail


def main() -> int:
    try:
        from meta_train.launch import main as launch
    except ModuleNotFoundError as e:
        return fail(f"lopt-train needs {e.name}: pip install 'lopt[train]'")
    return launch()


if __name__ == "__main__":
    sys.exit(main())
