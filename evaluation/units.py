"""Units of scores, by the names that they have in results."""

SHARE, NATS = "share", "nats"
