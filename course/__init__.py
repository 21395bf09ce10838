"""What runs and records the course; no lesson's plumbing is here. It may import helpers, which never imports it."""

import helpers  # noqa: F401  sets what torch reads from the environment, before anything here imports torch
