"""`python -m course run|refresh|test|alone|lock`."""

import sys

from course.runner import main

sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
sys.exit(main())
