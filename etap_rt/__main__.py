from __future__ import annotations

import sys

from etap_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
