"""The local app of `loopos ui`: pages over folders of runs, served on loopback from one static bundle."""
