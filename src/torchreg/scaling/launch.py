"""The command line of a launcher."""
