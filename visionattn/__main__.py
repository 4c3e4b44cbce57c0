"""`python -m visionattn`, the same as the command `visionattn`."""

import sys

from visionattn.cli import main

sys.exit(main())
