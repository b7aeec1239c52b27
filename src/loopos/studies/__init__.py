"""Studies of human feedback: which items people judge, their votes, and what the votes say."""
