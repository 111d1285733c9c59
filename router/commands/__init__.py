"""One file per command of the command line. Importing one imports nothing heavy."""
