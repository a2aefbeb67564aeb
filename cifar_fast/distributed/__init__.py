"""One recipe on several processes."""
