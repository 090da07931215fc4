"""Learning from unlabeled photos and masks."""
