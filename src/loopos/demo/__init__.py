"""The demo room: the small data sets packaged with LoopOS that `loopos demo` trains on, and their README."""
