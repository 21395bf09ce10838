"""The course's plumbing: what would hide the lesson if it stood in a notebook. Nothing heavy is imported here."""
