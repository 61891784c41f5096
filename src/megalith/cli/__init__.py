"""The command line: one file a command group, no logic. `main` holds the table of commands."""
