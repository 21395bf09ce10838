"""The same recipe on bigger machines: files for other engines, several processes, what it costs before one rents (notebook 08)."""
