"""Class-agnostic masks: reading, sampling, storing and making them."""
