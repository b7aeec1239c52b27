"""The command line: the table of commands, and one small module per command."""
