"""Whether data and weights can be trusted: noise and its cleaning, a harmless backdoor and its detectors, what the auditor looks at (notebook 07)."""
