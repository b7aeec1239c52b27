"""The evaluation room: metrics of predictions and the report of a run."""
