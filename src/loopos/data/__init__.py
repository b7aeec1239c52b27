"""Data: files and hub data sets become rows, rows become examples, examples become tokens and batches."""
