"""The training room: one optimizer step, the offline loop, and all that makes a run resumable."""
