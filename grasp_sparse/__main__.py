"""`python -m grasp_sparse` is `grasp-sparse`."""

from __future__ import annotations

import sys

from grasp_sparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
