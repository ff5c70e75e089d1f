"""What runs a cell: configuration, weights, data, the training engine, stages, tracking."""
