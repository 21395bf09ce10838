"""`python -m course run|refresh|test|alone|lock`."""

import sys

from course.runner import main

sys.exit(main())
