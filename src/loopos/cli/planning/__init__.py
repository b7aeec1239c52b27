"""What a run would take, told without running it: on this machine (`train --dry-run`) and on a cluster (`plan`)."""
