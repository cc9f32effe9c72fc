"""The command line, one module for each group of commands; what they do lives in the modules that they call."""
