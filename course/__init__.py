"""What runs and records the course; no lesson's plumbing is here. It may import helpers, which never imports it."""
